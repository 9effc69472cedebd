"""kill -9 at a known moment of a round: of a worker, of an agent, of the coordinator."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from harness import Federation, Running, coordinator, gone, run_toml, simulated, until

HONEST = ["client-0", "client-1"]
ALL = [*HONEST, "victim"]
QUIET = "[evaluation]\nevery = 0\n"
MIRRORED = '[strategy]\nname = "mirrored_sgd"\noptimizer = "momentum"\n'


@pytest.fixture(scope="module")
def enrolled(federation: Federation) -> Iterator[Federation]:
    """The federation with a third site, which each test starts and kills as it likes."""
    federation.enrol("victim")
    yield federation
    federation.clients["victim"].end()


def start(federation: Federation) -> Running:
    """The victim's agent, if it does not run already."""
    running = federation.clients.get("victim")
    if running is not None and running.process.poll() is None:
        return running
    return federation.start("victim")


def begin(federation: Federation, text: str) -> str:
    """Submit a run; its id, once all three sites are in the middle of its first round."""
    run_id = federation.submit(text)
    until(lambda: federation.ready(run_id) == set(ALL), "all have joined")
    federation.at_work("victim")
    return run_id


def rows(federation: Federation, run_id: str) -> list[list[str]]:
    return [list(row.clients) for row in federation.show(run_id).history]


def test_a_killed_worker_costs_one_round_and_is_replaced(enrolled: Federation) -> None:
    agent = start(enrolled)
    text = run_toml("killed-worker", rounds=3, size=3, more=QUIET)
    with enrolled.blocked("client-0"), enrolled.blocked("victim"):
        run_id = begin(enrolled, text)
        (worker,) = agent.workers()
        worker.kill()
        enrolled.server.says(f"order_failed run={run_id} site=victim")
    assert enrolled.finish(run_id).status == "done"
    assert rows(enrolled, run_id) == [HONEST, ALL, ALL]
    assert "worker_crashed: the worker was ended by SIGKILL" in enrolled.server.output
    (replacement,) = agent.workers()
    assert replacement.pid != worker.pid


def test_the_run_goes_on_without_a_killed_agent_and_no_worker_is_left(enrolled: Federation) -> None:
    agent = start(enrolled)
    text = run_toml("killed-agent", rounds=3, size=3, more=QUIET)
    with enrolled.blocked("victim"):
        with enrolled.blocked("client-0"):
            run_id = begin(enrolled, text)
            (worker,) = agent.workers()
            agent.signal(signal.SIGKILL)
            # The worker is in the middle of the task's code, and stays so: it must end all the same.
            until(lambda: gone(worker), "the worker has ended")
            until(lambda: enrolled.ready(run_id) == set(HONEST), "the coordinator has noticed")
        assert enrolled.finish(run_id).status == "done"
    assert rows(enrolled, run_id) == [HONEST] * 3
    assert enrolled.digest(run_id) == simulated(text)


def test_an_agent_that_is_killed_and_started_again_takes_part_in_the_same_round(
    enrolled: Federation,
) -> None:
    """Mirrored: its mirror is gone with it, so it is sent the model, and moves by gradients from there."""
    agent = start(enrolled)
    text = run_toml("rejoins", rounds=4, quorum=3, size=3, more=QUIET + MIRRORED)
    with enrolled.blocked("victim"):
        run_id = begin(enrolled, text)
        agent.signal(signal.SIGKILL)
        until(lambda: enrolled.ready(run_id) == set(HONEST), "the coordinator has noticed")
    start(enrolled)
    assert enrolled.finish(run_id).status == "done"
    assert rows(enrolled, run_id) == [ALL] * 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_a_run_and_its_agents_outlive_their_coordinator(
    tmp_path_factory: pytest.TempPathFactory, how: signal.Signals
) -> None:
    """It ends in the middle of a round: the next process goes on, to the same bits as without it."""
    text = run_toml("outlives", rounds=4, size=2, more=QUIET + "[checkpoint]\nseconds = 0\n")
    with coordinator(tmp_path_factory.mktemp("restarted")) as federation:
        agents = []
        for name in HONEST:
            federation.enrol(name)
            agents.append(federation.start(name))
        with federation.blocked("client-0"):
            run_id = federation.submit(text)
            federation.at_work("client-0")
            federation.server.signal(how)
            again = federation.restarted()
            until(lambda: again.ready(run_id) == set(HONEST), "the agents are back")
        assert again.finish(run_id).status == "done"
        assert rows(again, run_id) == [HONEST] * 4
        assert again.digest(run_id) == simulated(text)
        assert all(agent.process.poll() is None for agent in agents)
        assert not any("Traceback" in agent.output for agent in agents)
        assert "Traceback" not in again.server.output
        again.server.signal(signal.SIGTERM)
        last = again.restarted()
        assert last.show(run_id).summary.status == "done", "and it stays known"
        assert last.digest(run_id) == simulated(text)
