"""Several processes train: the numbers are the loop's, whoever does what, and whatever becomes of a worker."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated
import torch
from simulated import RUNS, config

from fedge import RunConfig, Task
from fedge.errors import ConfigError, TaskError
from fedge.events import OrderId, Send
from fedge_sim import Result, simulate
from fedge_sim.clients import Clients
from fedge_sim.engines.chosen import Origin, Wanted, chosen
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.processes import Processes
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts

WHOLE = {"batch_size": "full", "epochs": 2, "learning_rate": 0.05}


def run(task: str = "simulated:task", engine: Any = "processes", workers: int = 2, **tables: Any) -> Result:
    return simulate(config(task, **tables), engine=engine, workers=workers if engine == "processes" else None)


def same(one: Result, other: Result) -> None:
    assert (one.status, one.reason) == (other.status, other.reason)
    assert one.faults == other.faults
    assert one.privacy == other.privacy
    plain = [
        [{key: value for key, value in row.as_dict().items() if key != "seconds"} for row in each.history]
        for each in (one, other)
    ]
    assert plain[0] == plain[1]
    assert np.array_equal(one.model.vector, other.model.vector)


@pytest.mark.parametrize("tables", RUNS.values(), ids=RUNS)
def test_processes_come_to_the_bits_of_the_loop(tables: dict[str, Any]):
    """A model as small as this one has one thread in the loop, too."""
    divided = run(**tables)
    assert divided.engine == "processes"
    same(divided, run(engine="loop", **tables))


def test_the_number_of_workers_changes_no_bit():
    first, *others = (run("simulated:layered", workers=workers, work=WHOLE) for workers in (1, 2, 3))
    for other in others:
        same(first, other)
    assert first.engine == "processes", "what cannot be stacked can be done so"


def test_a_client_whose_work_fails_is_named_as_in_the_loop():
    with pytest.raises(TaskError, match="client-4, train order of round 1"):
        run("simulated:unreadable", cohort={"size": 8})


def test_what_is_not_finite_is_refused_as_in_the_loop():
    tables = {"work": {"batch_size": 64}, "cohort": {"size": 8, "quorum": 3}}
    divided = run("simulated:lost", **tables)
    same(divided, run("simulated:lost", engine="loop", **tables))
    assert divided.history[0].refused > 0


def test_a_worker_that_is_killed_ends_the_run_with_its_rounds_kept():
    """Client 7 is first asked in a later round."""
    killed = run("simulated:deadly", cohort={"size": 2}, rounds=40)
    assert killed.status == "failed"
    assert "a worker of the simulation ended by SIGKILL" in killed.reason
    assert "--workers" in killed.reason
    whole = run("simulated:task", "loop", cohort={"size": 2}, rounds=40)
    assert 0 < len(killed.history) < 40
    assert [row.clients for row in killed.history] == [row.clients for row in whole.history][
        : len(killed.history)
    ]


def test_a_task_without_a_name_is_done_by_processes_divided_from_the_one_that_made_it(tmp_path: Path):
    script = tmp_path / "notebook.py"
    script.write_text(
        "import json, simulated\n"
        "from fedge import RunConfig, Task\n"
        "from fedge_sim import simulate\n"
        f"run = RunConfig.from_table({config().model_dump(exclude_unset=True)!r}, source='run')\n"
        "task = Task(simulated.perceptron, simulated.data, simulated.task.loss, simulated.task.metrics)\n"
        "engines = ('processes', 'loop', 'processes')\n"
        "found = [simulate(run, task=task, engine=each).summary() for each in engines]\n"
        "print(json.dumps([[each['engine'], each['model_sha256']] for each in found]))\n"
    )
    path = os.pathsep.join([str(simulated.here()), *sys.path])
    done = subprocess.run(  # this Python
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": path},
    )
    engines, digests = zip(*json.loads(done.stdout), strict=True)
    assert engines == ("processes", "loop", "processes")
    assert len(set(digests)) == 1


def test_a_python_that_cannot_be_divided_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch):
    """As torch has it where a graphics card has computed gradients."""

    def never(self: torch.Tensor) -> None:
        raise RuntimeError(
            "Unable to handle autograd's threading in combination with fork-based multiprocessing"
        )

    monkeypatch.setattr(torch.Tensor, "backward", never)
    own = Task(simulated.perceptron, simulated.data, simulated.task.loss)
    crew = Processes(config(), kind="train", size=83, workers=2, own=own)
    try:
        with pytest.raises(UnsuitedError, match="put the task in a module and give its name"):
            crew.work([Send("client-1", OrderId("train", 1))], np.zeros(83, np.float32))
    finally:
        crew.close()


def clients_of(run: RunConfig, task: Task) -> Clients:
    return Clients(run, task, Population.of(run, task, count=8), Accounts(run, "train"))


def test_workers_are_gone_when_a_simulation_is_over():
    clients = clients_of(config(), simulated.task)
    crew = chosen(
        Wanted("processes", 2), config(), simulated.task, clients, kind="train", size=83, origin=Origin()
    )
    process = crew._crew._process  # type: ignore[union-attr]  # what the operating system knows of it
    assert process.poll() is None
    crew.close()
    assert process.poll() == 0


@pytest.mark.parametrize("engine", ["loop", "processes"])
def test_what_a_task_prints_is_not_the_output_of_the_command(engine: str, tmp_path: Path):
    (tmp_path / "run.toml").write_text(
        'name = "trial"\ntask = "simulated:talkative"\nrounds = 1\n[cohort]\nsize = 2\n[simulation]\nclients = 2\n'
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("fedge"), "simulate", "run.toml", "--engine", engine, "--json"],
        cwd=tmp_path,
        env={
            **{key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
            "PYTHONPATH": str(simulated.here()),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["engine"] == engine
    assert "the data of client-0" in done.stderr


@pytest.mark.parametrize("workers", [0, -1, 1025])
def test_there_are_some_workers(workers: int):
    with pytest.raises(ConfigError, match=f"workers: expected 1 to 1024 processes, found {workers}"):
        simulate(config(), engine="processes", workers=workers)


@pytest.mark.parametrize(
    ("workers", "rounds", "own", "says"),
    [
        (2, 1700, False, ""),
        (1, 1700, False, "there is one processor"),
        (2, 1600, False, "is over before workers have started"),
        (2, 1700, True, "has no name"),
    ],
    ids=["it pays", "one processor", "a short run", "an object"],
)
def test_processes_are_chosen_where_they_pay_by_a_rule(
    workers: int, rounds: int, own: bool, says: str, caplog: pytest.LogCaptureFixture
):
    run = config("simulated:layered", rounds=rounds)
    origin = Origin(own=simulated.layered) if own else Origin()
    clients = clients_of(run, simulated.layered)
    with caplog.at_level(logging.WARNING):
        crew = chosen(
            Wanted("auto", workers), run, simulated.layered, clients, kind="train", size=99, origin=origin
        )
    try:
        assert crew.name == ("loop" if says else "processes")
        assert says in crew.reasons.get("processes", "")
        assert not caplog.records, "nobody has asked for them"
    finally:
        crew.close()


def test_a_task_that_its_run_names_is_imported_by_name():
    assert Origin.of(None, name="simulated:task", folder=None).own is None
    assert Origin.of(simulated.task, name="simulated:task", folder=None).own is None
    own = Task(simulated.perceptron, simulated.data, simulated.task.loss)
    assert Origin.of(own, name="simulated:task", folder=None).own is own


def test_how_private_examples_are_clipped_does_not_depend_on_who_works_first():
    """The first client's examples have no gradients at all: by them another way is chosen than by the others'."""
    privacy = {"unit": "example", "epsilon": 50.0, "delta": 1e-3, "clip": 1.0}
    tables = {"privacy": privacy, "simulation": {"clients": 6}, "cohort": {"size": 6}, "rounds": 2}
    looped, *divided = (
        run("simulated:dead", engine, workers=workers, seed=2, **tables)
        for engine, workers in (
            ("loop", 1),
            ("processes", 1),
            ("processes", 2),
            ("processes", 3),
            ("processes", 6),
        )
    )
    for other in divided:
        same(looped, other)


def test_what_lies_in_the_current_folder_is_nobodys_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "selectors.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.chdir(tmp_path)
    assert run(rounds=1).status == "done"


def test_two_simulations_in_one_process_end_their_own_workers(monkeypatch: pytest.MonkeyPatch):
    """The second is divided from the process in which the first is at work, and inherits what that has open."""
    own = Task(simulated.perceptron, simulated.data, simulated.task.loss, simulated.task.metrics)
    inner: list[Result] = []

    def between(_: Any) -> None:
        if not inner:
            inner.append(simulate(config(), task=own, engine="processes", workers=2))

    def never(*_: int) -> None:
        raise AssertionError("workers were waited for in vain")

    monkeypatch.setattr(os, "killpg", never)
    same(simulate(config(), engine="processes", workers=2, callbacks=[between]), inner[0])
