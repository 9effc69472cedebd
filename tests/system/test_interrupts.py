"""Ctrl-C and SIGTERM, anywhere: the right exit code, no process left behind, nothing lost that was done."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Federation, Running, coordinator, gone, run_toml, tasks_into, until

from fedge.wire import fedge_pb2 as pb

INTERRUPTED = 130


@pytest.fixture(scope="module")
def stoppable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A federation of its own, whose parts may be stopped."""
    with coordinator(tmp_path_factory.mktemp("stoppable")) as federation:
        federation.enrol("site")
        yield federation


def ctrl_c(running: Running) -> int:
    """What a terminal does: SIGINT to the whole group, the worker included. The exit code."""
    os.killpg(running.pid, signal.SIGINT)
    return running.ends()


@pytest.mark.parametrize("stop", [ctrl_c, lambda agent: agent.signal(signal.SIGTERM)], ids=["ctrl-c", "term"])
def test_an_agent_stops_in_the_middle_of_a_round_and_takes_its_worker_with_it(
    stoppable: Federation, stop: object
) -> None:
    agent = stoppable.start("site")
    with stoppable.blocked("site"), stoppable.submitted(run_toml("stopped", quorum=1, size=1)):
        stoppable.at_work("site")
        (worker,) = agent.workers()
        assert stop(agent) == 0  # type: ignore[operator]
        until(lambda: gone(worker), "the worker has ended")
    assert "site site stopped" in agent.output
    assert "Traceback" not in agent.output


def test_an_agent_that_waits_for_a_coordinator_can_be_interrupted(stoppable: Federation) -> None:
    path = stoppable.folder / "site" / "client.toml"
    text = path.read_text()
    path.write_text(text.replace(stoppable.address, "127.0.0.1:1"))
    try:
        agent = Running.start("client", "start", path, log=stoppable.folder / "waiting.log")
        agent.says("cannot reach the coordinator")
        assert ctrl_c(agent) == 0
    finally:
        path.write_text(text)


def test_following_a_run_can_be_interrupted_and_the_run_goes_on(
    stoppable: Federation, tmp_path: Path
) -> None:
    tasks_into(tmp_path)
    (tmp_path / "run.toml").write_text(run_toml("followed"))
    admin = ("--admin", stoppable.admin_toml)
    submit = Running.start("run", "submit", tmp_path / "run.toml", "--watch", *admin, log=tmp_path / "submit")
    submit.says("waiting for clients")
    (run,) = [run for run in stoppable.admin.List(pb.ListRequest()).runs if run.name == "followed"]
    watch = Running.start("run", "watch", run.run_id, *admin, log=tmp_path / "watch")
    watch.says("waiting for clients")
    for follower in (submit, watch):
        assert ctrl_c(follower) == INTERRUPTED
        assert "Traceback" not in follower.output
    assert run.run_id in submit.output, "whoever interrupts must know what goes on"
    assert stoppable.show(run.run_id).summary.status == "waiting"
    stoppable.admin.Stop(pb.RunRef(run_id=run.run_id))


def test_a_simulation_that_is_interrupted_keeps_its_committed_rounds(tmp_path: Path) -> None:
    tasks_into(tmp_path)
    (tmp_path / "run.toml").write_text(run_toml("endless", rounds=1_000_000))
    arguments = ("simulate", "run.toml", "--clients", "2", "--out", tmp_path / "out")
    simulation = Running.start(*arguments, log=tmp_path / "log", cwd=tmp_path)
    simulation.says("round 3/")
    assert ctrl_c(simulation) == INTERRUPTED
    assert "Traceback" not in simulation.output
    summary = json.loads((tmp_path / "out" / "manifest.json").read_text())["summary"]
    rows = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    assert summary["status"] == "stopped"
    assert len(rows) == summary["rounds"] >= 3
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_coordinator_stops_with_a_run_under_way_and_its_followers_are_told(
    stoppable: Federation, tmp_path: Path, number: signal.Signals
) -> None:
    """Last, since it ends the coordinator; its sites wait for the next one."""
    federation = stoppable.restarted() if stoppable.server.process.poll() is not None else stoppable
    agent = federation.start("site")
    try:
        run_id = federation.submit(run_toml("unfinished", task="nowhere:task"))
        watch = Running.start(
            "run", "watch", run_id, "--admin", federation.admin_toml, log=tmp_path / "watch"
        )
        watch.says("waiting for clients")
        assert federation.server.signal(number) == 0
        assert f"run_interrupted run={run_id}" in federation.server.output
        assert "Traceback" not in federation.server.output
        assert watch.ends() == 4
        assert "Traceback" not in watch.output
        assert agent.process.poll() is None
        agent.says("cannot reach the coordinator")
    finally:
        federation.server.end()
        agent.end()
