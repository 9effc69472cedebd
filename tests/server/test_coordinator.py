"""Sites and runs on one coordinator: who is offered what, who takes part, and what is forgotten when."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tomlkit

from fedge.errors import BusyError, ConfigError, FedgeError, RunError
from fedge.events import OrderId
from fedge.principal import Principal
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.signing import SignedDirectory
from fedge.vector import Layout, Model, Tensor, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge_server.archive import Archive
from fedge_server.coordinator import IDLE_S, Coordinator, Submission
from fedge_server.driver import RunDriver
from fedge_server.past import PastRun
from fedge_server.sessions import Session
from fedge_server.settings import ServerSettings
from fedge_server.spool import Spool
from fedge_server.standing import clients_of
from fedge_server.store.database import Database
from fedge_server.store.store import Store
from fedge_strategies import FedAvg

DAY = datetime(2026, 1, 1, tzinfo=UTC)
NO = Refusal(RefusalCode.NO_DATA, "no data")
Play = Callable[[Coroutine[Any, Any, None]], None]


async def no_keys() -> SignedDirectory:
    raise RunError("no directory of keys here")


@pytest.fixture
def coordinator_of(tmp_path: Path) -> Iterator[Callable[..., Coordinator]]:
    """Makes coordinators, one process after another as it were: all on the same store."""
    database = Database(f"sqlite:///{tmp_path / 'fedge.db'}")
    database.open()
    (tmp_path / "spool").mkdir()
    archives = []

    def make(**settings: Any) -> Coordinator:
        archives.append(Archive(Store(database), tmp_path / "checkpoints"))
        spool = Spool(tmp_path / "spool")
        return Coordinator(ServerSettings(listen="h:1", **settings), spool, archives[-1], no_keys)

    yield make
    for archive in archives:
        archive.close()
    database.close()


def session(site: str) -> Session:
    return Session(Principal("f" * 32, "site", site, 1, DAY, DAY))


async def submit(coordinator: Coordinator, **tables: Any) -> RunDriver:
    table = {"name": "a", "task": "app:task", "rounds": 1, "cohort": {"size": 1}, **tables}
    model = Model(np.zeros(2, np.float32), Layout((Tensor("w", (2,)),)))
    config = RunConfig.from_table(table, source="run.toml")
    return await coordinator.submit(Submission(tomlkit.dumps(table), config, model))


async def last_word(link: Session) -> pb.Closing:
    """What a site is told at the end of its session."""
    async for batch in link.outgoing():
        last = batch[-1]
    return last.closing


async def read(link: Session) -> list[Any]:
    """What a site was sent since it was last asked, as (kind, run id)."""
    for _ in range(20):
        await asyncio.sleep(0)
    found = []
    while link._queue:
        found += link._batch()
    return [(kind := m.WhichOneof("kind"), getattr(getattr(m, kind), "run_id", "")) for m in found]


def test_every_connected_site_is_offered_every_open_run_and_one_that_comes_later_too(
    coordinator_of, play: Play
):
    async def scenario() -> None:
        coordinator, early, late = coordinator_of(), session("early"), session("late")
        coordinator.connect(early)
        one, two = await submit(coordinator), await submit(coordinator)
        coordinator.stop(one.run_id)
        assert await read(early) == [("offer", one.run_id), ("offer", two.run_id)]
        coordinator.connect(late)
        assert await read(late) == [("offer", two.run_id)]
        await coordinator.shut_down(20)

    play(scenario())


def test_a_site_takes_part_once_it_accepts_until_it_refuses_or_is_gone(coordinator_of, play: Play):
    async def scenario() -> None:
        coordinator, north, south = coordinator_of(), session("north"), session("south")
        run = await submit(coordinator, cohort={"size": 2})
        for site in (north, south):
            coordinator.connect(site)
            coordinator.accept(site, run.run_id)
            coordinator.accept(site, run.run_id)
        await read(north)
        assert run.machine.clients == {"north", "south"}
        coordinator.refuse(north, run.run_id, NO)
        coordinator.disconnect(south)
        await read(north)
        assert run.machine.clients == set()
        assert run.history.refusals == {"north": NO}
        coordinator.accept(north, run.run_id)
        await read(north)
        assert run.machine.clients == {"north"}
        assert run.history.refusals == {}
        await coordinator.shut_down(20)

    play(scenario())


def test_a_site_that_connects_again_takes_over_and_what_the_old_session_says_is_nobodys(
    coordinator_of, play: Play
):
    async def scenario() -> None:
        coordinator, old, new = coordinator_of(), session("north"), session("north")
        run = await submit(coordinator, cohort={"size": 2})
        coordinator.connect(old)
        coordinator.accept(old, run.run_id)
        coordinator.connect(new)
        assert old.closed
        assert coordinator.sessions == {"north": new}
        assert await read(new) == [("offer", run.run_id)]
        assert run.machine.clients == set()
        coordinator.accept(new, run.run_id)
        coordinator.disconnect(old)  # its stream ends a moment later
        await read(new)
        assert coordinator.sessions == {"north": new}
        assert run.machine.clients == {"north"}
        await coordinator.shut_down(20)

    play(scenario())


def test_a_failure_counts_only_from_a_site_that_takes_part(coordinator_of, play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        run = await submit(coordinator)
        coordinator.connect(north)
        coordinator.fail(north, run.run_id, OrderId("train", 1), NO)
        coordinator.fail(north, "another", OrderId("train", 1), NO)
        await read(north)
        assert run.history.refusals == {}
        coordinator.accept(north, run.run_id)
        coordinator.fail(north, run.run_id, OrderId("train", 1), NO)
        await read(north)
        assert run.history.refusals == {"north": NO}
        await coordinator.shut_down(20)

    play(scenario())


def test_a_site_that_is_ready_too_late_is_told_that_the_run_is_over(coordinator_of, play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        run = await submit(coordinator)
        coordinator.connect(north)
        coordinator.stop(run.run_id)
        await read(north)
        coordinator.accept(north, run.run_id)
        assert await read(north) == [("ended", run.run_id)]
        coordinator.accept(north, "unknown")
        coordinator.refuse(north, "unknown", NO)
        await coordinator.shut_down(20)

    play(scenario())


def test_the_operators_limits_hold(coordinator_of, play: Play):
    async def scenario() -> None:
        coordinator = coordinator_of(max_runs=2, max_sessions=1)
        first, _ = await submit(coordinator), await submit(coordinator)
        with pytest.raises(RunError, match="has its 2 open runs; stop one first"):
            await submit(coordinator)
        north = session("north")
        coordinator.connect(north)
        with pytest.raises(BusyError, match="has its 1 sessions") as busy:
            coordinator.connect(session("south"))
        assert busy.value.retry_after_s > 1
        coordinator.connect(session("north"))  # the same site: no further one
        coordinator.stop(first.run_id)
        await read(north)
        await submit(coordinator)
        await coordinator.shut_down(20)

    play(scenario())


def test_a_site_that_is_idle_for_long_makes_room_and_is_told_when_to_come_back(
    coordinator_of, play: Play, monkeypatch: pytest.MonkeyPatch
):
    async def scenario() -> None:
        coordinator = coordinator_of(max_sessions=2)
        run = await submit(coordinator)
        busy, idle = session("busy"), session("idle")
        coordinator.connect(busy)
        coordinator.accept(busy, run.run_id)
        coordinator.connect(idle)
        loop = asyncio.get_running_loop()
        later = loop.time() + 2 * IDLE_S
        with monkeypatch.context() as patch:
            patch.setattr(loop, "time", lambda: later)
            coordinator.connect(session("new"))
            with pytest.raises(BusyError):  # the one that is new has its place for a while
                coordinator.connect(session("newer"))
        assert set(coordinator.sessions) == {"busy", "new"}
        closing = await last_word(idle)
        assert closing.reason == "others need the place"
        assert closing.retry_after_s > 1
        await coordinator.shut_down(20)

    play(scenario())


def test_sites_that_are_sent_away_are_to_come_back_one_after_another(coordinator_of, play: Play):
    async def scenario() -> None:
        coordinator = coordinator_of()
        sites = [session(f"site-{number}") for number in range(50)]
        for site in sites:
            coordinator.connect(site)
        await coordinator.shut_down(20)
        told = [(await last_word(site)).retry_after_s for site in sites]
        assert len(set(told)) == len(told)
        assert 0.5 < min(told) < max(told) < 1.0

    play(scenario())


def test_old_runs_are_forgotten_oldest_first_and_open_ones_never(coordinator_of, play: Play, tmp_path: Path):
    async def scenario() -> None:
        coordinator, north = coordinator_of(max_finished_runs=2), session("north")
        coordinator.connect(north)
        open_run = await submit(coordinator)
        ended = []
        for _ in range(4):
            run_id = (await submit(coordinator)).run_id
            ended.append(run_id)
            coordinator.accept(north, run_id)
            coordinator.runs[run_id].history.refusals["south"] = NO
            coordinator.stop(run_id)
            await coordinator._tasks[run_id]
            await read(north)
        kept = (await submit(coordinator)).run_id
        assert list(coordinator.runs) == [open_run.run_id, kept]
        assert list(coordinator.past) == ended[2:]
        told = {(each.name, each.detail) for each in clients_of(coordinator.past[ended[2]])}
        assert ("south", str(NO)) in told, "why a site said no outlives the run"
        assert (tmp_path / "checkpoints" / ended[2]).exists()
        for run_id in ended[:2]:
            assert not (tmp_path / "checkpoints" / run_id).exists()
            with pytest.raises(RunError, match="expected the id of a run on this coordinator"):
                coordinator.find(run_id)
        coordinator.disconnect(north)  # also of the runs that are gone
        await coordinator.shut_down(20)

    play(scenario())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    """A strategy of a user's that raises as soon as it is asked for anything."""
    module = ModuleType("trial_strategy")
    source = (
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Broken:\n"
        "    reduction = max_staleness = None\n"
        "    def init(self, model): raise KeyError('weights')\n"
        "    def order(self, state, round): ...\n"
        "    def step(self, state, aggregate): ...\n"
    )
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "trial_strategy", module)
    return "trial_strategy:Broken"


def test_a_strategy_that_cannot_begin_is_the_submitters_error_and_leaves_no_run(
    coordinator_of, play: Play, broken: str
):
    async def scenario() -> None:
        coordinator = coordinator_of(strategies=[broken])
        with pytest.raises(
            ConfigError, match="'trial_strategy:Broken' cannot begin this run: KeyError: 'weights'"
        ):
            await submit(coordinator, strategy={"name": broken})
        assert coordinator.runs == {}
        with pytest.raises(FedgeError, match="is not one that this coordinator may import"):
            await submit(coordinator_of(), strategy={"name": broken})

    play(scenario())


def test_a_shutdown_ends_every_session_and_every_run(coordinator_of, play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        before = asyncio.all_tasks()
        run = await submit(coordinator)
        coordinator.connect(north)
        coordinator.accept(north, run.run_id)
        await read(north)
        await coordinator.shut_down(20)
        assert north.closed
        assert "shutting down" in north.ended_because
        assert asyncio.all_tasks() == before

    play(scenario())


def test_an_offer_says_all_that_a_site_needs_to_decide(coordinator_of, play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        coordinator.connect(north)
        await submit(coordinator, seed=9, rounds=4, privacy={"unit": "none", "clip": 0.5}, work={"steps": 3})
        offer: pb.Offer = north._queue[0].offer
        assert (offer.name, offer.task, offer.rounds, offer.seed) == ("a", "app:task", 4, 9)
        assert (offer.clip, offer.work.steps) == (0.5, 3)
        assert offer.strategy == repr(FedAvg())
        assert [tensor.name for tensor in offer.layout.tensors] == ["w"]
        await submit(coordinator)
        assert not north._queue[1].offer.HasField("clip")
        await coordinator.shut_down(20)

    play(scenario())


# The next process.


def test_a_run_goes_on_in_the_next_process_with_what_was_kept(coordinator_of, play: Play):
    async def scenario() -> None:
        first = coordinator_of()
        run = await submit(first, cohort={"size": 2}, rounds=3, evaluation={"every": 0})
        for name in ("north", "south"):
            link = session(name)
            first.connect(link)
            first.accept(link, run.run_id)
        await hand_in(first, run, "north", OrderId("train", 1), 1.0)
        await hand_in(first, run, "south", OrderId("train", 1), 3.0)
        await hand_in(first, run, "north", OrderId("train", 2), 4.0)
        await first.shut_down(20)

        second = coordinator_of()
        await second.recover()
        again = second.driver(run.run_id)
        assert again.machine.committed == 1
        assert [row.clients for row in again.history.rows] == [("north", "south")]
        np.testing.assert_array_equal(again.model.vector, np.float32([2, 2]))
        link = session("north")
        second.connect(link)
        second.accept(link, run.run_id)
        assert ("order", run.run_id) not in await read(link), "its update is here already"
        assert again.unwanted("north", OrderId("train", 2)).code == RefusalCode.DUPLICATE
        link = session("south")
        second.connect(link)
        second.accept(link, run.run_id)
        assert ("order", run.run_id) in await read(link), "it is asked again"
        await hand_in(second, again, "south", OrderId("train", 2), 0.0)
        np.testing.assert_array_equal(again.model.vector, np.float32([4, 4]))
        await second.shut_down(20)

    play(scenario())


def test_a_run_that_has_ended_is_still_known_to_the_next_process(coordinator_of, play: Play):
    async def scenario() -> None:
        first = coordinator_of()
        run = await submit(first, evaluation={"every": 0})
        link = session("north")
        first.connect(link)
        first.accept(link, run.run_id)
        await hand_in(first, run, "north", OrderId("train", 1), 5.0)
        await first._tasks[run.run_id]
        await first.shut_down(20)
        second = coordinator_of()
        await second.recover()
        (past,) = second.all_runs()
        assert isinstance(past, PastRun)
        assert (past.machine.status, past.machine.committed, past.waiting_for) == ("done", 1, "")
        np.testing.assert_array_equal(past.read_model().vector, np.float32([5, 5]))
        second.stop(run.run_id)
        with pytest.raises(RunError, match="is over, or cannot go on here"):
            second.driver(run.run_id)
        await second.shut_down(20)

    play(scenario())


def test_a_run_whose_strategy_is_not_to_be_had_waits_and_says_why(
    coordinator_of, play: Play, monkeypatch: pytest.MonkeyPatch
):
    async def scenario() -> None:
        module = ModuleType("trial_strategy")
        module.Own = FedAvg
        monkeypatch.setitem(sys.modules, "trial_strategy", module)
        own = "trial_strategy:Own"
        first = coordinator_of(strategies=[own])
        run = await submit(first, strategy={"name": own})
        other = await submit(first)
        await first.shut_down(20)
        second = coordinator_of()
        await second.recover()
        assert list(second.runs) == [other.run_id], "the others go on"
        held = second.find(run.run_id)
        assert held.machine.status == "running"
        assert "its operator adds it to `strategies` in server.toml" in held.waiting_for
        await second.shut_down(20)
        third = coordinator_of(strategies=[own])
        await third.recover()
        assert set(third.runs) == {run.run_id, other.run_id}
        await third.shut_down(20)

    play(scenario())


async def hand_in(coordinator: Coordinator, run: RunDriver, site: str, order: OrderId, value: float) -> None:
    """An update that counts."""
    vector = np.full(2, value, np.float32)
    upload = coordinator.spool.upload(size=vector.nbytes, digest=digest_of(vector))
    upload.write(vector.tobytes())
    upload.finish()
    assert await run.deliver(site, order, pb.Update(num_examples=1), upload) is None
    for _ in range(20):
        await asyncio.sleep(0)
