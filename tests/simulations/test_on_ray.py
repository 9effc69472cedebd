"""A Ray cluster of two nodes does the work: to the numbers of the loop, also when one of them is lost."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import simulated
import torch.nn.functional as F
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations
from simulated import RUNS, config

from fedge import Task
from fedge.errors import ConfigError, RunError, TaskError
from fedge.events import OrderId, Send
from fedge.exact import ExactSum, Term
from fedge_sim import Result, simulate
from fedge_sim.clients import Clients
from fedge_sim.engines import node, on_ray
from fedge_sim.engines.chosen import ENGINES
from fedge_sim.engines.processes import Processes
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts

WHOLE = {"batch_size": "full", "epochs": 2, "learning_rate": 0.05}
NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024 * 1024}


class Nodes:
    """Two of them, on addresses of their own that only this machine has; the driver is on the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "node_ip_address": "127.0.0.2", "include_dashboard": False},
        )
        self.address: str = self._cluster.address
        self.add()

    def add(self) -> None:
        self.second = self._cluster.add_node(**NODE, node_ip_address="127.0.0.3")

    def lose(self) -> None:
        """As when its power fails."""
        self._cluster.remove_node(self.second, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("FEDGE_TEST_FOLDER", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        found = Nodes(folder)
        patch.setenv("RAY_ADDRESS", found.address)
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
            yield found
        finally:
            ray.shutdown()
            found.close()


def run(
    task: str = "simulated:task", engine: Any = "ray", workers: int | None = None, **tables: Any
) -> Result:
    return simulate(config(task, **tables), engine=engine, workers=workers)


def close_to(one: Result, other: Result, *, exactly: bool) -> None:
    assert (one.status, one.reason) == (other.status, other.reason)
    assert one.faults == other.faults
    assert one.privacy == other.privacy
    assert [row.clients for row in one.history] == [row.clients for row in other.history]
    assert [(row.bytes_up, row.bytes_down, row.refused) for row in one.history] == [
        (row.bytes_up, row.bytes_down, row.refused) for row in other.history
    ]
    assert np.allclose(one.model.vector, other.model.vector, atol=2e-6)
    if exactly:
        assert np.array_equal(one.model.vector, other.model.vector)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("tables", RUNS.values(), ids=RUNS)
def test_nodes_come_to_the_numbers_of_the_loop(tables: dict[str, Any]):
    divided = run(**tables)
    assert divided.engine == "ray"
    close_to(divided, run(engine="loop", **tables), exactly=False)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("workers", [None, 1, 3])
def test_what_cannot_be_stacked_comes_to_the_bits_of_the_loop_whatever_the_workers(workers: int | None):
    found = run("simulated:layered", workers=workers, work=WHOLE)
    close_to(found, run("simulated:layered", "loop", work=WHOLE), exactly=True)


@pytest.mark.usefixtures("nodes")
def test_stacks_of_a_cohort_of_many_tasks_are_the_same_bits_whatever_the_workers(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(on_ray, "STACKED", 4)
    one, other = (run(workers=workers) for workers in (1, 2))
    close_to(one, other, exactly=True)
    close_to(one, run(engine="loop"), exactly=False)


def crew(task: Task = simulated.task, name: str = "simulated:task", *, size: int = 83) -> on_ray.OnRay:
    run = config(name)
    clients = Clients(run, task, Population.of(run, task, count=8), Accounts(run, "train"))
    return on_ray.OnRay(run, task, clients, kind="train", size=size, stacked=False)


SENDS = [Send(f"client-{at}", OrderId("train", 1)) for at in range(6)]


def by_processes(model: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    workers = Processes(config(), kind="train", size=83, workers=1)
    try:
        return np.array(workers.work(SENDS, model)[1])
    finally:
        workers.close()


@pytest.mark.usefixtures("nodes")
def test_partial_sums_come_back_and_no_update():
    model = np.linspace(-1, 1, 83, dtype=np.float32)
    found = crew()
    outcomes, rows = found.work(SENDS, model)
    assert all(each is not None and each.num_examples == 4 + 3 * at for at, each in enumerate(outcomes))
    for weights in ([3, 1, 4, 1, 5, 9], [2, 7, 1]):
        mean = found.mean(weights)
        assert {task.fetched is None for task in found._tasks} == {True}
        expected = by_processes(model)
        terms = [Term(row, weight) for row, weight in zip(expected, weights, strict=False)]
        assert mean is not None
        assert np.array_equal(mean, ExactSum(83).mean(sum(weights), *terms))
    assert np.array_equal([row[:] for row in rows], expected), "they can be had"
    found.close()
    assert ray.is_initialized(), "it was so before"


def test_a_node_that_is_lost_at_work_costs_no_bit(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_ray, "STACKED", 2)
    whole = run("on_nodes:held", work=WHOLE)
    (nodes.folder / "lost").write_text(nodes.second.node_id)
    stop = threading.Event()

    def lose() -> None:
        while not (nodes.folder / "held").exists():
            if stop.wait(0.05):
                return
        nodes.lose()

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        found = run("on_nodes:held", work=WHOLE, name="again")
    finally:
        stop.set()
        thread.join()
        (nodes.folder / "lost").unlink()
        if (nodes.folder / "held").exists():
            nodes.add()
    assert (nodes.folder / "held").exists(), "somebody was at work there"
    close_to(found, whole, exactly=True)


def test_what_a_lost_node_has_made_is_made_again_when_its_sum_is_wanted(nodes: Nodes):
    size = 6 * 12000 + 12000 + 3 * 12000 + 3
    model = np.linspace(-1, 1, size, dtype=np.float32)
    found = crew(simulated.wide, "simulated:wide", size=size)
    for _ in range(20):  # a node whose processes are slow to start may be left out at first
        found.work(SENDS, model)
        before = found.mean([1] * 6)
        places = get_object_locations([task.rows for task in found._tasks])
        if some_are_there := any(nodes.second.node_id in each["node_ids"] for each in places.values()):
            break
    assert some_are_there
    nodes.lose()
    try:
        after = found.mean([1] * 6)
    finally:
        nodes.add()
    assert before is not None
    assert after is not None
    assert np.array_equal(before, after)
    found.close()


def test_what_a_process_has_done_before_changes_no_bit():
    """Client 0's examples cannot be stacked with the others': that is a matter of its task alone."""
    run = config("simulated:uneven")
    setting = {"kind": "train", "stacked": True, "folder": None, "path": []}
    told = json.dumps({**setting, "run": run.model_dump(mode="json", exclude_unset=True)})
    model = np.linspace(-1, 1, 83, dtype=np.float32)

    def task(*clients: int) -> str:
        order = {"kind": "train", "round": 1, "attempt": 1}
        return json.dumps({**order, "clients": [f"client-{at}" for at in clients]})

    node._place.cache_clear()
    alone, rows, _ = node.train(told, model, task(1, 2, 3))
    node._place.cache_clear()
    mixed, _, _ = node.train(told, model, task(0, 1))
    after, again, _ = node.train(told, model, task(1, 2, 3))
    assert None not in json.loads(mixed)["done"]
    assert alone == after
    assert np.array_equal(rows, again)


@pytest.mark.usefixtures("nodes")
def test_a_model_that_cannot_be_stacked_is_found_out_once_and_said(caplog: pytest.LogCaptureFixture):
    found = run("simulated:layered", work=WHOLE)
    assert found.engine == "ray"
    assert [each.message for each in caplog.records if "ray_trains_one_by_one" in each.message] == [
        "ray_trains_one_by_one reason=its model has more than parameters of its own: "
        "1.running_mean, 1.running_var"
    ]


@pytest.mark.usefixtures("nodes")
def test_a_node_that_cannot_begin_in_a_later_round_costs_none_of_the_earlier(monkeypatch: pytest.MonkeyPatch):
    work = on_ray.OnRay.work

    def fails(self: on_ray.OnRay, sends: Any, model: Any) -> Any:
        if sends[0].order.round == 3:
            raise ConfigError("a node of the Ray cluster cannot begin: no such folder")
        return work(self, sends, model)

    monkeypatch.setattr(on_ray.OnRay, "work", fails)
    found = run()
    assert (found.status, len(found.history)) == ("failed", 2)
    assert "no such folder" in found.reason


@pytest.mark.usefixtures("nodes")
def test_a_cluster_without_processors_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_ray, "_SAID_EVERY_S", 0.05)
    monkeypatch.setattr(on_ray, "_LOST_S", 0.2)
    monkeypatch.setattr(on_ray, "_processors", lambda _: 0)
    never = ray.remote(lambda: 0).options(resources={"what nobody has": 1}).remote()
    with pytest.raises(RunError, match="the Ray cluster has had no processor"):
        on_ray._next_of([never])
    ray.cancel(never)


@pytest.mark.usefixtures("nodes")
def test_vectors_that_were_all_taken_are_not_kept():
    found = crew()
    _, rows = found.work(SENDS, np.linspace(-1, 1, 83, dtype=np.float32))
    for row in rows:
        row[:10]
    assert all(task.fetched is not None for task in found._tasks)
    for row in rows:
        row[:]
    assert all(task.fetched is None for task in found._tasks)
    found.close()


@pytest.mark.usefixtures("nodes")
def test_a_client_whose_work_fails_is_named_as_in_the_loop():
    with pytest.raises(TaskError, match="client-4, train order of round 1"):
        run("simulated:unreadable", cohort={"size": 8})


@pytest.mark.usefixtures("nodes")
def test_what_is_not_finite_is_refused_as_in_the_loop():
    tables = {"work": {"batch_size": 64}, "cohort": {"size": 8, "quorum": 3}}
    found = run("simulated:lost", **tables)
    close_to(found, run("simulated:lost", "loop", **tables), exactly=False)
    assert found.history[0].refused > 0


@pytest.mark.usefixtures("nodes")
def test_a_task_that_kills_its_workers_ends_the_run_with_its_rounds_kept():
    """Client 7 is first asked in a later round."""
    killed = run("simulated:deadly", cohort={"size": 2}, rounds=40)
    assert killed.status == "failed"
    assert "the Ray cluster has lost a task, after 3 repetitions" in killed.reason
    assert 0 < len(killed.history) < 40


@pytest.mark.usefixtures("nodes")
def test_a_node_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The task is in a folder that was there when the simulation began, and that nodes do not find."""
    (tmp_path / "here_only.py").write_text("from simulated import task\n")
    (tmp_path / "run.toml").write_text(
        'name = "trial"\ntask = "here_only:task"\nrounds = 1\n[cohort]\nsize = 2\n[simulation]\nclients = 2\n'
    )
    real = on_ray.OnRay

    def moved(*arguments: Any, folder: Path, **given: Any) -> Any:
        return real(*arguments, folder=folder / "elsewhere", **given)

    monkeypatch.setattr(on_ray, "OnRay", moved)
    with pytest.raises(
        ConfigError, match=r"a node of the Ray cluster cannot begin: expected the folder of the task"
    ):
        simulate(tmp_path / "run.toml", engine="ray")


def test_a_task_as_an_object_is_refused_since_no_other_machine_could_import_it():
    own = Task(simulated.perceptron, simulated.data, F.cross_entropy)
    with pytest.raises(ConfigError, match=r"engine ray: the task was given as an object.*put it in a module"):
        simulate(config(), task=own, engine="ray")
    assert "ray" in ENGINES


def test_that_ray_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "fedge_sim.engines.on_ray")
    with pytest.raises(ConfigError, match=re.escape("engine ray: it needs ray: pip install 'fedge[ray]'")):
        run()


def as_typed(folder: Path, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.toml").write_text(
        'name = "trial"\ntask = "simulated:task"\nrounds = 2\nseed = 5\n'
        "[cohort]\nsize = 3\n[simulation]\nclients = 4\n"
    )
    command = [Path(sys.executable).with_name("fedge"), "simulate", "run.toml", "--engine", "ray", *more]
    path = os.pathsep.join([str(simulated.here()), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": address}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_uses_the_cluster_that_is_there_and_leaves_it(nodes: Nodes, tmp_path: Path):
    done = as_typed(tmp_path, nodes.address, "--json", "--out", "results")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["status"], summary["engine"]) == ("done", "ray")
    assert ray.cluster_resources()["CPU"] == 2.0


@pytest.mark.parametrize("stale", [True, False])
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path, stale: bool):
    address = "127.0.0.1:nothing"
    if stale:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
    done = as_typed(tmp_path, address)
    assert done.returncode != 0
    assert "engine ray:" in done.stderr
    assert "Traceback" not in done.stderr
    assert ("cannot be reached" in done.stderr) == stale


@pytest.mark.usefixtures("nodes")
def test_what_goes_wrong_on_a_node_by_a_mistake_of_ours_is_an_error_of_the_run():
    found = crew()
    with pytest.raises(RunError, match="a task on the Ray cluster failed: KeyError: 'nobody'"):
        found.work([Send("nobody", OrderId("train", 1))], np.zeros(83, np.float32))
    found.close()
