"""A run on the coordinator: what its sites are sent and told, and what is recorded, round by round."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest

from fedge.errors import StorageError
from fedge.events import OrderId
from fedge.learning import Learning
from fedge.refusal import RefusalCode
from fedge.snapshot import revive
from fedge.strategy import Order
from fedge.vector import digest_of
from fedge.wire.limits import INLINE_BYTES
from fedge_server import driver as drivers
from fedge_server.archive import Saved
from fedge_server.moments import moment_of, start_of
from fedge_strategies import FedAvg, MirroredSgd, Sgd
from fedge_strategies.fedavg import FedAvgState

LARGE = INLINE_BYTES // 4 + 1
"""Elements that do not ride in an order."""


def test_rounds_commit_the_exact_mean_and_everybody_is_told_of_the_end(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", "b", "c", cohort={"size": 3})
        first = OrderId("train", 1)
        assert [run.orders(site) for site in "abc"] == [[first]] * 3
        for site, value, examples in (("c", 0.5, 30), ("a", -1.0, 10), ("b", 4.0, 20)):
            assert await run.deliver(site, first, value, examples=examples, train_loss=value) is None
        np.testing.assert_array_equal(run.driver.model.vector, np.float32((15 - 10 + 80) / 60))
        second = OrderId("train", 2)
        assert [run.orders(site)[1:] for site in "abc"] == [[second]] * 3
        for site in "abc":
            assert await run.deliver(site, second, 1.0) is None
        assert await run.ended() == "done"
        np.testing.assert_array_equal(run.driver.model.vector, np.float32(85 / 60) + np.float32(1))
        one, two = run.driver.history.rows
        assert (one.round, one.attempt, one.clients, one.num_examples) == (1, 1, ("a", "b", "c"), 60)
        assert one.metrics == {"train_loss": pytest.approx(85 / 60)}
        assert (two.round, two.num_examples) == (2, 30)
        assert [row.bytes_up for row in (one, two)] == [48, 48]
        assert [row.bytes_down for row in (one, two)] == [48, 48]
        assert [run.messages(site, "ended")[0].status for site in "abc"] == ["done"] * 3

    play(scenario())


def test_updates_of_many_sites_wait_for_a_reduction_that_looks_at_all_of_them(start_run, play):
    async def scenario() -> None:
        sites = "abcdefghijklmnopqrstu"
        run = await start_run(FedAvg(aggregation="median"), *sites, cohort={"size": len(sites)}, rounds=1)
        for at, site in enumerate(sites):
            assert await run.deliver(site, OrderId("train", 1), 1e6 if at < 10 else float(at)) is None
        assert await run.ended() == "done"
        np.testing.assert_array_equal(run.driver.model.vector, np.float32(20))

    play(scenario())


def test_an_order_carries_the_model_of_the_round_before(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1, "deadline_s": 77.0})
        for before, value in ((0.0, 3.0), (3.0, 2.0)):
            order = run.messages("a", "order")[-1]
            assert order.model.inline == np.full(4, before, np.float32).tobytes()
            assert order.model.digest == digest_of(order.model.inline)
            assert (order.run_id, order.deadline_s) == ("a-1", 77.0)
            await run.deliver("a", run.orders("a")[-1], value)
        assert await run.ended() == "done"

    play(scenario())


def test_a_late_a_second_and_an_unasked_update_are_answered_by_type(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), *"abcd", cohort={"size": 2, "over_select": 1.5}, rounds=3)
        first = OrderId("train", 1)
        asked = [site for site in "abcd" if run.orders(site)]
        assert len(asked) == 3
        (spare,) = set("abcd") - set(asked)
        refusals = []

        async def refused(site: str, order: OrderId) -> None:
            model = run.driver.model.vector
            refusals.append((await run.deliver(site, order)).code)
            assert run.driver.model.vector is model

        await refused(spare, first)
        await refused("nobody", first)
        await refused(asked[0], OrderId("train", 2))
        await refused(asked[0], OrderId("evaluate", 1))
        assert await run.deliver(asked[0], first) is None
        await refused(asked[0], first)
        assert await run.deliver(asked[1], first) is None
        cancels = [cancel.id for cancel in run.messages(asked[2], "cancel")]
        assert [(cancel.round, cancel.attempt) for cancel in cancels] == [(1, 1)]
        await refused(asked[2], first)
        await refused(asked[0], first)
        code = RefusalCode
        assert refusals == [*[code.NOT_ASKED] * 4, code.DUPLICATE, code.LATE, code.DUPLICATE]
        assert run.driver.history.rows[0].refused == 5, "those after the round count for the next"
        run.stop()
        await run.ended()

    play(scenario())


def test_what_would_be_refused_is_known_before_it_is_read(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", "b", cohort={"size": 2})
        order = OrderId("train", 1)
        assert run.driver.unwanted("a", order) is None
        assert run.driver.unwanted("c", order).code == RefusalCode.NOT_ASKED
        await run.deliver("a", order)
        assert run.driver.unwanted("a", order).code == RefusalCode.DUPLICATE
        assert run.driver.unwanted("b", order) is None, "asking changes nothing"
        run.stop()
        await run.ended()
        assert run.driver.unwanted("b", order).code == RefusalCode.RUN_ENDED

    play(scenario())


def test_the_metrics_of_an_evaluation_join_the_row_of_its_round(start_run, play):
    async def scenario() -> None:
        run = await start_run(
            FedAvg(), "a", "b", cohort={"size": 1}, evaluation={"every": 2, "clients": 2}, rounds=2
        )
        for number in (1, 2):
            (site,) = [s for s in "ab" if OrderId("train", number) in run.orders(s)]
            await run.deliver(site, OrderId("train", number), train_loss=float(number))
        judged = OrderId("evaluate", 2)
        assert [run.orders(site, "evaluate") for site in "ab"] == [[judged]] * 2
        assert await run.deliver("a", judged, examples=30, loss=1.0) is None
        assert await run.deliver("b", judged, examples=10, loss=2.0, accuracy=0.5) is None
        assert await run.ended() == "done"
        rows = [dict(row.metrics) for row in run.driver.history.rows]
        assert rows == [{"train_loss": 1.0}, {"train_loss": 2.0, "loss": 1.25, "accuracy": 0.5}]

    play(scenario())


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_orders_for_mirrors_carry_the_whole_model_once_and_then_the_way_to_the_next(start_run, play, kind):
    async def scenario() -> None:
        run = await start_run(MirroredSgd(kind), "a", cohort={"size": 1}, rounds=3)
        models: list[bytes] = []
        for number in (1, 2, 3):
            order = run.messages("a", "order")[-1]
            models.append(order.model.digest)
            assert order.mirror.optimizer.kind == kind
            assert order.mirror.HasField("advance") == (number > 1)
            assert order.model.HasField("inline") == (number == 1)
            assert order.mirror.slots.HasField("inline") == (number == 1)
            if number > 1:
                assert order.mirror.advance.from_digest == models[-2]
                gradient = order.mirror.advance.gradient.inline
                assert gradient == np.full(4, number - 1.0, np.float32).tobytes()
            for blob in (order.model, order.mirror.slots):
                assert run.driver.shelf.find("a", blob.digest) is not None, "for those who have no mirror"
            await run.deliver("a", OrderId("gradient", number), float(number))
        assert await run.ended() == "done"
        assert [row.bytes_down for row in run.driver.history.rows][1:] == [16, 16]

    play(scenario())


def test_a_large_model_is_fetched_by_those_whose_order_names_it_and_only_while_it_is_open(start_run, play):
    async def scenario() -> None:
        cohort = {"size": 2, "over_select": 1.5}
        run = await start_run(FedAvg(), *"abcd", size=LARGE, cohort=cohort, rounds=1, evaluation={"every": 1})
        one, two, spare = [site for site in "abcd" if run.orders(site)]
        (order,) = run.messages(one, "order")
        assert not order.model.HasField("inline")

        def may_fetch() -> list[str]:
            return [site for site in "abcd" if run.driver.shelf.find(site, order.model.digest) is not None]

        assert bytes(run.driver.shelf.find(one, order.model.digest)) == bytes(4 * LARGE)
        assert may_fetch() == sorted([one, two, spare])
        run.driver.count(down=4 * LARGE)
        await run.deliver(one, OrderId("train", 1), 0.0)
        assert may_fetch() == sorted([two, spare])
        await run.deliver(two, OrderId("train", 1), 1.0)
        assert may_fetch() == [], "the last one was called off"
        assert run.driver.history.rows[0].bytes_down == 4 * LARGE
        run.stop()
        await run.ended()

    play(scenario())


def test_a_vector_too_large_for_the_loop_is_folded_and_stepped_on_a_thread_just_the_same(start_run, play):
    async def scenario() -> None:
        size = drivers._ON_THREAD_BYTES // 4 + 5
        run = await start_run(FedAvg(), size=size, cohort={"size": 2}, rounds=1)
        run.join("a", "b")
        while not (run.orders("a") and run.orders("b")):  # nobody signals it
            await asyncio.sleep(0.001)
        vectors = [np.random.default_rng(seed).normal(size=size).astype(np.float32) for seed in (1, 2)]
        answers = await asyncio.gather(
            *(run.deliver(site, OrderId("train", 1), v) for site, v in zip("ab", vectors, strict=True))
        )
        assert answers == [None, None]
        assert await run.ended() == "done"
        mean = (vectors[0].astype(np.float64) + vectors[1]) / 2
        np.testing.assert_array_equal(run.driver.model.vector, mean.astype(np.float32))

    play(scenario())


def test_each_gradient_is_a_step_and_a_stale_one_gets_its_client_the_current_model(start_run, play):
    async def scenario() -> None:
        strategy = Sgd(learning_rate=0.5, max_staleness=1)
        run = await start_run(strategy, "a", "b", cohort={"size": 1}, rounds=5)
        assert await run.deliver("a", OrderId("gradient", 1), 1.0) is None
        assert await run.deliver("a", OrderId("gradient", 2), 1.0) is None
        stale = await run.deliver("b", OrderId("gradient", 1), 100.0)
        assert stale.code == RefusalCode.STALE
        assert run.orders("b") == [OrderId("gradient", 1), OrderId("gradient", 3)]
        assert await run.deliver("a", OrderId("gradient", 3), 1.0) is None
        assert await run.deliver("b", OrderId("gradient", 3), 1.0) is None
        np.testing.assert_array_equal(run.driver.model.vector, np.full(4, -2.0, np.float32))
        assert [row.staleness for row in run.driver.history.rows] == [0, 0, 0, 1]
        run.stop()
        await run.ended()

    play(scenario())


def test_who_judges_an_older_model_and_works_on_a_newer_one_can_fetch_both(start_run, play):
    async def scenario() -> None:
        run = await start_run(
            Sgd(), "a", "b", size=LARGE, cohort={"size": 1}, evaluation={"every": 2, "clients": 2}, rounds=9
        )
        await run.deliver("a", OrderId("gradient", 1))
        await run.deliver("a", OrderId("gradient", 2))  # "b" is at work, and shall judge round 2 after it
        assert run.orders("b") == [OrderId("gradient", 1), OrderId("evaluate", 2)]
        judged = run.messages("b", "order")[-1].model.digest
        await run.deliver("b", OrderId("gradient", 1))
        newest = run.messages("b", "order")[-1].model.digest
        assert newest != judged
        assert run.driver.shelf.find("b", judged) is not None
        assert run.driver.shelf.find("b", newest) is not None
        run.stop()
        await run.ended()

    play(scenario())


@dataclass(frozen=True)
class Asked:
    """FedAvg that keeps for which rounds it was asked what to do."""

    rounds: list[int] = field(default_factory=list)
    reduction = FedAvg().reduction
    max_staleness = None

    def init(self, model) -> FedAvgState:
        return FedAvg().init(model)

    def order(self, state: FedAvgState, round: int) -> Order:
        self.rounds.append(round)
        return Order("train")

    def step(self, state: FedAvgState, aggregate) -> FedAvgState:
        return FedAvg().step(state, aggregate)


def test_a_strategy_is_asked_for_the_order_of_each_round(start_run, play):
    async def scenario() -> None:
        strategy = Asked()
        run = await start_run(strategy, "a", cohort={"size": 1}, rounds=3)
        for number in (1, 2, 3):
            assert strategy.rounds[-1] == number
            await run.deliver("a", OrderId("train", number))
        assert await run.ended() == "done"

    play(scenario())


def test_a_run_without_parameters_is_nobodys_crash(start_run, play):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", size=0, cohort={"size": 1}, rounds=1)
        assert await run.deliver("a", OrderId("train", 1), np.zeros(0, np.float32)) is None
        assert await run.ended() == "done"

    play(scenario())


# Client-level privacy.

PRIVACY = {"unit": "client", "delta": 1e-5, "clip": 1.0, "noise_multiplier": 1.0}


def test_nothing_is_told_of_a_noised_model_before_it_is_certain_that_it_is_not_made_again(
    start_run, play, archive, monkeypatch
):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1}, privacy=PRIVACY)
        keep, disk = archive.keep, asyncio.Event()

        def fails(moment: object) -> None:
            if not disk.is_set():
                raise StorageError("the disk is full")
            keep(moment)

        monkeypatch.setattr(archive, "keep", fails)
        before = run.driver.model.vector
        assert await run.deliver("a", OrderId("train", 1)) is None
        for _ in range(5):
            await asyncio.sleep(0.05)
            assert run.driver.model.vector is before
            assert run.orders("a") == [OrderId("train", 1)]
            assert run.driver.history.rows == []
        assert "cannot keep this run" in run.driver.waiting_for
        disk.set()
        while len(run.orders("a")) < 2:
            await asyncio.sleep(0.05)
        order = run.messages("a", "order")[-1]
        assert order.model.inline == run.driver.model.vector.tobytes() != before.tobytes()
        assert order.clip == 1.0
        assert await run.deliver("a", OrderId("train", 2)) is None
        assert await run.ended() == "done"

    play(scenario())


def test_a_defect_in_keeping_a_noised_round_is_no_reason_to_tell_of_it(start_run, play, archive, monkeypatch):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1}, rounds=1, privacy=PRIVACY)
        keep, calls = archive.keep, []

        def breaks(moment: object) -> None:
            calls.append(moment)
            if len(calls) == 1:
                raise KeyError("a defect")
            keep(moment)

        monkeypatch.setattr(archive, "keep", breaks)
        assert await run.deliver("a", OrderId("train", 1)) is None
        while not calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert "internal error: KeyError" in run.driver.waiting_for
        assert run.driver.history.rows == []
        assert await run.ended() == "done"

    play(scenario())


def test_the_noised_metrics_of_a_noised_round_are_kept_before_they_are_told(start_run, play, archive):
    async def scenario() -> None:
        privacy = {**PRIVACY, "evaluation_noise_multiplier": 5.0}
        run = await start_run(
            FedAvg(), "a", cohort={"size": 1}, rounds=3, privacy=privacy, evaluation={"every": 1}
        )
        for number in (1, 2, 3):
            for kind in ("train", "evaluate"):
                while OrderId(kind, number) not in run.orders("a", kind):
                    await asyncio.sleep(0.01)
                assert await run.deliver("a", OrderId(kind, number), loss=1.0) is None
        assert await run.ended() == "done"
        assert [set(row.metrics) for row in run.driver.history.rows] == [{"clip", "loss"}] * 3
        assert list(archive.store.rows(run.driver.run_id)) == run.driver.history.rows

    play(scenario())


def test_what_was_kept_of_a_noised_round_is_the_round_that_was_told(start_run, play, archive):
    async def scenario() -> None:
        run = await start_run(FedAvg(), "a", cohort={"size": 1}, rounds=3, privacy=PRIVACY)
        assert await run.deliver("a", OrderId("train", 1)) is None
        while len(run.orders("a")) < 2:
            await asyncio.sleep(0.01)
        (kept,) = [each for each in archive.store.runs() if each.record.run_id == run.driver.run_id]
        assert kept.progress.committed == 1
        assert [row.round for row in archive.store.rows(run.driver.run_id)] == [1]
        begun = Learning.begin(FedAvg(), run.driver.model, run.driver._execution.learning.central)
        like = Saved(begun.model.vector, begun.kept)
        assert np.array_equal(revive(archive.read(kept), like).model, run.driver.model.vector)
        run.stop()
        await run.ended()

    play(scenario())


def test_an_evaluation_that_is_begun_anew_after_a_crash_is_without_what_came_for_the_earlier_one(
    start_run, play, archive
):
    """Without rounds the model moves on while it is judged: after a crash it is judged again, as it is then."""

    async def scenario() -> None:
        strategy = Sgd(max_staleness=8)
        run = await start_run(
            strategy, "a", "b", cohort={"size": 1}, evaluation={"every": 2, "clients": 2}, rounds=9
        )
        await run.deliver("a", OrderId("gradient", 1))
        await run.deliver("a", OrderId("gradient", 2))
        judged = OrderId("evaluate", 2)
        assert judged in run.orders("a", "evaluate")
        assert await run.deliver("a", judged, loss=100.0) is None
        await run.deliver("a", OrderId("gradient", 3))
        execution = run.driver._execution
        accepted = execution.waiting._all()
        assert [each.order for each in accepted] == [judged]
        moment = moment_of(run.driver.run_id, run.driver.machine, execution.learning, accepted=accepted)
        await archive.call(archive.keep, moment)
        (kept,) = [each for each in archive.store.runs() if each.record.run_id == run.driver.run_id]
        start = start_of(kept, strategy, None, run.driver.model.layout, archive, run.spool)
        assert start.machine.evaluation is not None
        assert start.machine.evaluation.order == OrderId("evaluate", 3)
        assert start.accepted == ()
        run.stop()
        await run.ended()

    play(scenario())
