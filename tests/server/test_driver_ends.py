"""How a run on the coordinator ends: by its clock, its owner, its strategy's defects; and who is told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest

from fedge.errors import StorageError
from fedge.events import Arrived, OrderId
from fedge.pipeline import Mean
from fedge.refusal import RefusalCode
from fedge.strategy import Order
from fedge_server import driver as drivers
from fedge_server.driver import Delivery
from fedge_server.spool import Held
from fedge_strategies import FedAvg, MirroredSgd, Sgd
from fedge_strategies.fedavg import FedAvgState

FIRST = OrderId("train", 1)
SOON, LATER = 0.02, 0.4
"""Seconds; how long it really takes is never looked at. What happens before LATER takes a millisecond."""


# The clock.


def test_a_round_closes_at_its_deadline_with_a_quorum(start_run, play):
    async def scenario() -> None:
        run = await start_run(
            FedAvg(), *"abc", cohort={"size": 3, "quorum": 2, "deadline_s": LATER}, rounds=1
        )
        assert await run.deliver("a", FIRST, 1.0) is None
        assert await run.deliver("c", FIRST, 3.0) is None
        assert await run.ended() == "done"
        np.testing.assert_array_equal(run.driver.model.vector, np.full(4, 2.0, np.float32))
        assert run.driver.history.rows[0].clients == ("a", "c")
        assert len(run.messages("b", "cancel")) == 1

    play(scenario())


def test_a_round_without_a_quorum_is_tried_again_without_what_came_before(start_run, play):
    async def scenario() -> None:
        run = await start_run(
            FedAvg(), "a", "b", cohort={"size": 2, "deadline_s": LATER, "attempts": 9}, rounds=1
        )
        assert await run.deliver("a", FIRST, 100.0) is None
        while len(run.orders("a")) < 2:  # nobody signals it
            await asyncio.sleep(SOON)
        assert run.orders("a")[1] == OrderId("train", 1, 2)
        assert (await run.deliver("b", FIRST)).code == RefusalCode.LATE
        for site in "ab":
            assert await run.deliver(site, OrderId("train", 1, 2), 1.0) is None
        assert await run.ended() == "done"
        assert run.driver.history.rows[0].attempt == 2
        np.testing.assert_array_equal(run.driver.model.vector, np.ones(4, np.float32))

    play(scenario())


def test_a_round_that_never_gets_its_quorum_fails_the_run_with_the_reason(start_run, play):
    async def scenario() -> None:
        run = await start_run(
            FedAvg(), "a", "b", cohort={"size": 2, "deadline_s": SOON, "attempts": 2}, rounds=1
        )
        assert await run.ended() == "failed"
        assert run.orders("a") == [FIRST, OrderId("train", 1, 2)]
        assert run.driver.machine.reason == f"round 1: 0 of at least 2 updates after {SOON} s"
        assert run.messages("a", "ended")[0].reason == run.driver.machine.reason

    play(scenario())


def test_a_run_that_nobody_comes_to_ends_when_its_wait_is_over(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 2, "wait_s": SOON})
        assert run.driver.machine.waiting_for == "waiting for clients: 1 of 2 are ready"
        assert await run.ended() == "failed"
        assert run.driver.machine.reason == f"round 1: 1 of at least 2 clients after {SOON} s"
        assert run.sent[-1][0] == "a"

    play(scenario())


def test_an_evaluation_that_nobody_answers_does_not_hold_the_run_up(start_run, play):
    async def scenario() -> None:
        run = await start_run(
            FedAvg(), "a", cohort={"size": 1, "deadline_s": LATER}, evaluation={"every": 1}, rounds=1
        )
        await run.deliver("a", FIRST)
        assert await run.ended() == "done"
        assert run.driver.history.rows[0].metrics == {}

    play(scenario())


def test_no_timer_outlives_its_round_or_its_run(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1}, evaluation={"every": 1}, rounds=9)
        timers = run.driver._timers._handles
        for number in (1, 2):
            await run.deliver("a", OrderId("train", number))
            await run.deliver("a", OrderId("evaluate", number))
            assert len(timers) == 1
            assert len(run.driver._execution._orders._messages) <= 2
        (last,) = timers.values()
        run.stop()
        await run.ended()
        assert timers == {}
        assert last.cancelled()

    play(scenario())


# The owner.


def test_a_stopped_run_keeps_what_it_has_committed_and_calls_its_sites_off(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", "b", cohort={"size": 2}, rounds=9)
        await run.deliver("a", FIRST, 2.0)
        await run.deliver("b", FIRST, 2.0)
        await run.deliver("a", OrderId("train", 2), 50.0)
        run.stop()
        assert await run.ended() == "stopped"
        assert len(run.driver.history.rows) == 1
        np.testing.assert_array_equal(run.driver.model.vector, np.full(4, 2.0, np.float32))
        assert [message.id.round for message in run.messages("b", "cancel")] == [2]
        assert run.messages("a", "cancel") == []
        assert [run.messages(site, "ended")[0].status for site in "ab"] == ["stopped"] * 2

    play(scenario())


def test_whatever_comes_after_the_end_is_answered(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1}, rounds=1)
        await run.deliver("a", FIRST)
        assert await run.ended() == "done"
        before = len(run.sent)
        assert (await run.deliver("a", FIRST)).code == RefusalCode.RUN_ENDED
        run.join("b")
        run.leave("a")
        run.stop()
        run.fail("a", FIRST)
        assert len(run.sent) == before
        assert run.driver.shelf.find("a", bytes(32)) is None

    play(scenario())


def test_what_waits_in_the_queue_when_the_run_ends_is_answered(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", "b", cohort={"size": 2}, rounds=1)
        run.stop()
        update = asyncio.create_task(run.deliver("a", FIRST))
        run.join("c")
        assert (await update).code == RefusalCode.RUN_ENDED
        await run.ended()
        ended = [message.status for message in run.messages("c", "ended")]
        assert ended == ["stopped"], "it would keep its place for this run for ever"

    play(scenario())


async def followed_to_the_end(run) -> None:
    revision = run.driver.history.revision
    while not run.driver.over:
        revision = await run.driver.history.changed_after(revision)


@pytest.mark.parametrize("how", ["stop", "crash"])
def test_watchers_learn_of_the_end(start_run, play, how):
    async def scenario() -> None:
        run = await start_run(Broken(step_fails=1), "a", cohort={"size": 1})
        news = asyncio.create_task(followed_to_the_end(run))
        if how == "stop":
            run.stop()
        else:
            await run.deliver("a", FIRST, round=1.0)
        await run.ended()
        await news

    play(scenario())


# Sites that cannot.


def test_a_failure_costs_its_site_this_round_and_is_remembered(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", "b", cohort={"size": 2, "quorum": 1}, rounds=2)
        run.fail("a", FIRST, "no data")
        await run.deliver("b", FIRST)
        (row,) = run.driver.history.rows
        assert (row.clients, row.refused) == (("b",), 1)
        assert run.driver.history.refusals["a"].message == "no data"
        await run.deliver("a", OrderId("train", 2))
        assert run.driver.history.refusals == {}
        run.stop()
        await run.ended()

    play(scenario())


def test_a_site_that_left_gets_its_order_again_when_it_is_back(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", "b", cohort={"size": 2}, rounds=1)
        run.leave("a")
        await run.deliver("b", FIRST)
        run.join("a")
        await asyncio.sleep(0)
        assert await run.deliver("a", FIRST) is None
        assert run.orders("a") == [FIRST, FIRST]
        assert await run.ended() == "done"

    play(scenario())


def test_a_flood_of_events_loses_the_floods_and_never_the_clocks_or_the_owners(start_run, play, monkeypatch):
    async def scenario() -> None:
        monkeypatch.setattr(drivers, "MAX_WAITING_EVENTS", 50)
        run = await start_run(FedAvg(), "a", "b", cohort={"size": 2}, rounds=1)
        receipt = asyncio.get_running_loop().create_future()
        for _ in range(51):
            run.fail("nobody", FIRST)
        run.driver.post(Arrived("a", FIRST), Delivery(1, {}, None, receipt))
        run.stop()
        assert (await receipt).message == "the coordinator is overloaded"
        assert await run.ended() == "stopped"
        assert run.driver.machine.reason == "stopped by its owner"

    play(scenario())


# Strategies that break.


@dataclass(frozen=True)
class Broken:
    """FedAvg that raises at a round's step, or when it is asked for the order of the next."""

    step_fails: int = 0
    order_fails: int = 0
    reduction = Mean()
    max_staleness = None

    def init(self, model) -> FedAvgState:
        return FedAvg().init(model)

    def order(self, state: FedAvgState, round: int) -> Order:
        if round == self.order_fails:
            raise KeyError("order")
        return Order("train")

    def step(self, state: FedAvgState, aggregate) -> FedAvgState:
        if aggregate.metrics["round"] == self.step_fails:
            raise ZeroDivisionError("step")
        return FedAvg().step(state, aggregate)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (Broken(step_fails=2), "internal error: ZeroDivisionError: step"),
        (Broken(order_fails=3), "internal error: KeyError: 'order'"),
        (FedAvg(1e38), "round 2 made a model with NaN or infinity: lower the learning rate"),
        (MirroredSgd(learning_rate=1e38), "round 2 made a model with NaN or infinity"),
        (Sgd(learning_rate=1e38), "round 2 made a model with NaN or infinity"),
    ],
    ids=lambda each: str(each)[:40],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_defect_ends_its_own_run_with_the_reason_and_no_other(start_run, play, strategy, reason):
    async def scenario() -> None:
        run = await start_run(strategy, "a", "b", cohort={"size": 2}, rounds=5)
        other = await start_run(FedAvg(), "a", cohort={"size": 1}, rounds=1)
        kind = run.orders("a")[0].kind
        for number, value in ((1, 0.0), (2, 1e10)):
            for site in "ab"[: 1 if kind == "gradient" and strategy.max_staleness else 2]:
                order = OrderId(kind, number)
                assert await run.deliver(site, order, value, round=float(number)) is None
        assert await run.ended() == "failed"
        assert run.driver.machine.reason.startswith(reason)
        assert [run.messages(site, "ended")[0].status for site in "ab"] == ["failed"] * 2
        assert np.isfinite(run.driver.model.vector).all()
        if "NaN" in reason:
            assert [row.round for row in run.driver.history.rows] == [1]
            np.testing.assert_array_equal(run.driver.model.vector, np.zeros(4))
        assert (await run.deliver("a", OrderId(kind, 2))).code == RefusalCode.RUN_ENDED
        assert await other.deliver("a", FIRST) is None
        assert await other.ended() == "done"

    play(scenario())


def test_an_update_whose_bytes_cannot_be_read_back_ends_the_run(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1}, rounds=1)

        class Gone:
            size = 16
            digest = bytes(32)
            in_file = closed = False

            def held(self):
                return Held(None, b"")

            def __len__(self):
                return 4

            def __getitem__(self, part):
                raise StorageError("spool: an update cannot be read back: Input/output error")

            def close(self) -> None: ...

        update = drivers.pb.Update(num_examples=1)
        assert await run.driver.deliver("a", FIRST, update, Gone()) is None
        assert await run.ended() == "failed"
        assert run.driver.machine.reason == "spool: an update cannot be read back: Input/output error"
        assert run.messages("a", "ended")[0].status == "failed"

    play(scenario())
