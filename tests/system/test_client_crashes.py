"""An agent is killed at every phase of its work and started again: the run comes out as if it had not been."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from harness import Federation, coordinator, run_toml, simulated, until

from fedge.faults import CLIENT_POINTS

SITES = ["client-0", "client-1"]
ROUNDS = 3
LARGE, SMALL = "wide:task", "tiny:task"
"""Updates that are delivered in chunks, and those that ride in one message."""

PHASES = [*((point, LARGE) for point in CLIENT_POINTS), ("job.prepared", SMALL), ("update.sent", SMALL)]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A federation whose second agent every test starts and kills as it likes."""
    with coordinator(tmp_path_factory.mktemp("client-crashes")) as federation:
        for name in SITES:
            federation.enrol(name)
        federation.start("client-0")
        yield federation
        assert "Traceback" not in federation.server.output
        assert "Traceback" not in federation.clients["client-0"].output


KEPT = {
    "variates": ("steps = 3", '[strategy]\nname = "scaffold"\nclients = 2\n'),
    "layers": ('personal = ["bias"]', ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", ["job.ordered", "job.trained", "job.prepared", "update.sent"])
@pytest.mark.parametrize("kept", KEPT)
def test_an_agent_that_is_killed_goes_on_with_what_it_keeps(sites: Federation, point: str, kept: str) -> None:
    work, more = KEPT[kept]
    text = run_toml(f"{kept}-{point}".replace(".", "-"), rounds=6, more="[evaluation]\nevery = 0\n")
    text = text.replace("[work]\n", f"[work]\n{work}\n") + more
    victim = sites.start("client-1", fault=f"{point}:4")
    run_id = sites.submit(text)
    assert victim.ends() == -signal.SIGKILL, f"{point} was reached"
    again = sites.start("client-1")
    try:
        assert sites.finish(run_id).status == "done"
        assert sites.digest(run_id) == simulated(text)
    finally:
        again.signal(signal.SIGTERM)
        until(lambda: "client-1" not in sites.connected(), "client-1 is gone")


@pytest.mark.slow
@pytest.mark.parametrize(("point", "task"), PHASES)
def test_an_agent_that_is_killed_at_any_phase_goes_on_where_it_was(
    sites: Federation, point: str, task: str
) -> None:
    hit = 1 if point == "job.joined" else 2
    name = f"{point}-{task.partition(':')[0]}".replace(".", "-")
    text = run_toml(name, task=task, rounds=ROUNDS, more="[evaluation]\nevery = 0\n")
    victim = sites.start("client-1", fault=f"{point}:{hit}")
    run_id = sites.submit(text)
    assert victim.ends() == -signal.SIGKILL, f"{point} was reached"
    again = sites.start("client-1")
    try:
        summary = sites.finish(run_id)
        assert summary.status == "done", summary.reason
        history = sites.show(run_id).history
        assert [list(row.clients) for row in history] == [SITES] * ROUNDS
        assert [row.attempt for row in history] == [1] * ROUNDS
        assert sites.digest(run_id) == simulated(text)
    finally:
        again.signal(signal.SIGTERM)
        until(lambda: "client-1" not in sites.connected(), "client-1 is gone")
