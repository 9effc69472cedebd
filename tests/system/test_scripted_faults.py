"""What a simulation says of a run with faults is what real processes make of the same faults: cohorts and model."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import coordinator, until

from fedge import federation
from fedge.config import parse_toml
from fedge.events import OrderId, Send
from fedge.run import RunConfig
from fedge.vector import bytes_of
from fedge_sim import Result, simulate

SITES = [f"client-{index}" for index in range(4)]
DEEDS = {"failure": "raise", "corruption": "nan"}
"""What the real task does at a fault of the simulation: it raises, or its loss is no number."""

RUN = """\
name = "scripted"
task = "tiny:task"
rounds = 12
seed = 3

[work]
batch_size = "full"
learning_rate = 0.05

[cohort]
size = 2
deadline_s = 60
wait_s = 60
attempts = 20

[evaluation]
every = 0

[simulation]
clients = 4

[simulation.faults]
failure = 0.2
corruption = 0.15

[simulation.devices]
compute = 1.0

[simulation.availability]
kind = "trace"
trace = "there.csv"
"""
THERE = "client,from_s,to_s\n0,0,1e9\n1,0,1e9\n2,1,1e9\n3,1,1e9\n"
"""Two begin, and two come while they are at work."""


def told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, dict[str, list[OrderId]]]:
    """The simulation, and the orders that it gave each client."""
    given: dict[str, list[OrderId]] = defaultdict(list)
    real: Any = {name: getattr(federation, name) for name in ("begin", "step")}

    def noting(name: str) -> Any:
        def noted(*arguments: Any) -> federation.RunStep:
            machine, effects = real[name](*arguments)
            for effect in effects:
                if isinstance(effect, Send):
                    given[effect.client].append(effect.order)
            return machine, effects

        return noted

    (folder / "there.csv").write_text(THERE)
    with monkeypatch.context() as patched:
        patched.chdir(folder)
        for name in real:
            patched.setattr(federation, name, noting(name))
        run = parse_toml(RUN, RunConfig, source="run.toml")
        return simulate(run, task=tiny.task, engine="loop"), given


def test_a_deployment_with_the_same_faults_commits_the_same_cohorts_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the coordinator is stopped in the middle, and goes on when it is started again."""
    result, given = told(tmp_path, monkeypatch)
    assert result.status == "done"
    assert not any(strike.order.round == 1 for strike in result.faults.strikes), "two are all there are"
    assert min(result.faults.counts[fault] for fault in DEEDS) > 1
    struck = {(strike.client, strike.order): DEEDS[strike.fault] for strike in result.faults.strikes}
    with coordinator(tmp_path) as deployed:
        for name in SITES:
            deployed.enrol(name)
            # A whole batch is one step, and asks the loss once: a line of the script is an order.
            lines = [struck.get((name, order), "") for order in given[name]]
            (deployed.control(name) / "script").write_text("".join(f"{line}\n" for line in lines))
        with deployed.blocked("client-0"):
            for name in SITES[:2]:
                deployed.start(name)
            run_id = deployed.submit(RUN)
            deployed.at_work("client-0")
            for name in SITES[2:]:
                deployed.start(name)
            until(lambda: deployed.ready(run_id) == set(SITES), "all are there")
            deployed.server.end()
            deployed = deployed.restarted()
            until(lambda: deployed.ready(run_id) == set(SITES), "all are there again")
        assert deployed.finish(run_id).status == "done"
        rows = deployed.show(run_id).history
        assert [tuple(row.clients) for row in rows] == [row.clients for row in result.history]
        assert [row.attempt for row in rows] == [row.attempt for row in result.history]
        assert [row.num_examples for row in rows] == [row.num_examples for row in result.history]
        digest = hashlib.sha256(bytes_of(result.model.vector)).hexdigest()
        assert deployed.digest(run_id) == digest
        left = [(deployed.control(name) / "script").read_text() for name in SITES]
        assert left == [""] * 4, "every site was given the orders that the simulation gave it"
