"""What operators are told of a run: who is at work, how far that is, and who is missing."""

from __future__ import annotations

from fedge.events import Left, OrderId, Progressed
from fedge.refusal import Refusal, RefusalCode
from fedge_server.standing import Site, clients_of, progress_of, summary_of
from fedge_strategies import FedAvg, Sgd

TRAIN = OrderId("train", 1)


def test_a_run_that_waits_names_the_sites_that_are_missing(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 3})
        run.driver.history.refusals["d"] = Refusal(RefusalCode.NO_DATA, "no data")
        sites = [Site("a", True), Site("b", False), Site("c", True), Site("d", True)]
        summary = summary_of(run.driver, sites)
        assert summary.status == "waiting"
        assert summary.reason == (
            "waiting for clients: 1 of 3 are ready; not connected: b; connected, but not ready: c; "
            "1 refused, d: no_data: no data"
        )
        assert summary.progress == ""
        run.stop()
        await run.ended()

    play(scenario())


def test_an_open_round_says_who_is_at_work_and_how_far_that_is(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", "b", "c", cohort={"size": 3, "quorum": 1})
        run.driver.progressed("b", TRAIN, 420)
        run.driver.post(Left("c"))
        await run.deliver("a", TRAIN)
        assert progress_of(run.driver.machine) == (
            "train order of round 1: 1 of 3 updates are in; at work: b (42 %); gone: c"
        )
        assert summary_of(run.driver).status == "running"
        states = {client.name: (client.state, client.detail) for client in clients_of(run.driver)}
        assert states == {"a": ("ready", ""), "b": ("working", "train order of round 1 (42 %)")}
        run.stop()
        await run.ended()
        assert summary_of(run.driver).progress == ""

    play(scenario())


def test_of_many_the_first_are_named(start_run, play):
    async def scenario() -> None:
        names = [f"site-{number:03}" for number in range(100)]
        run = await start_run(FedAvg(), *names, cohort={"size": 100})
        assert progress_of(run.driver.machine).endswith("site-006, site-007 and 92 more")
        run.stop()
        await run.ended()

    play(scenario())


def test_a_run_without_rounds_says_who_is_at_work(start_run, play):
    async def scenario() -> None:
        run = await start_run(Sgd(), "a", "b")
        assert progress_of(run.driver.machine) == "round 1: at work are a, b"
        run.stop()
        await run.ended()

    play(scenario())


def test_progress_that_cannot_be_is_ignored(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1})
        for permille in (0, 1001, 2**32 - 1):
            run.driver.progressed("a", TRAIN, permille)
        run.driver.post(Progressed("stranger", TRAIN, 5))
        await run.deliver("stranger", TRAIN)
        assert run.driver.machine.training.progress == frozenset()
        run.stop()
        await run.ended()

    play(scenario())
