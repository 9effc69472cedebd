"""Sites and runs on one coordinator: who is offered what, who takes part, and what is forgotten when."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedge.errors import ConfigError, FedgeError, RunError
from fedge.principal import Principal
from fedge.refusal import Refusal, RefusalCode
from fedge.round import OrderId
from fedge.run import RunConfig
from fedge.vector import Layout, Model, Tensor
from fedge.wire import fedge_pb2 as pb
from fedge_server.coordinator import Coordinator
from fedge_server.driver import RunDriver
from fedge_server.sessions import Session
from fedge_server.settings import ServerSettings
from fedge_server.spool import Spool
from fedge_strategies import FedAvg

DAY = datetime(2026, 1, 1, tzinfo=UTC)
NO = Refusal(RefusalCode.NO_DATA, "no data")
Play = Callable[[Coroutine[Any, Any, None]], None]


def coordinator_of(**settings: Any) -> Coordinator:
    return Coordinator(ServerSettings(listen="h:1", **settings), Spool(Path("nowhere")))


def session(site: str) -> Session:
    return Session(Principal("f" * 32, "site", site, 1, DAY, DAY))


def submit(coordinator: Coordinator, **tables: Any) -> RunDriver:
    table = {"name": "a", "task": "app:task", "rounds": 1, "cohort": {"size": 1}, **tables}
    model = Model(np.zeros(2, np.float32), Layout((Tensor("w", (2,)),)))
    return coordinator.submit(RunConfig.from_table(table, source="run.toml"), model)


async def read(link: Session) -> list[Any]:
    """What a site was sent since it was last asked, as (kind, run id)."""
    for _ in range(20):
        await asyncio.sleep(0)
    found = []
    while link._queue:
        found += link._batch()
    return [(kind := m.WhichOneof("kind"), getattr(getattr(m, kind), "run_id", "")) for m in found]


def test_every_connected_site_is_offered_every_open_run_and_one_that_comes_later_too(play: Play):
    async def scenario() -> None:
        coordinator, early, late = coordinator_of(), session("early"), session("late")
        coordinator.connect(early)
        one, two = submit(coordinator), submit(coordinator)
        coordinator.stop(one.run_id)
        assert await read(early) == [("offer", one.run_id), ("offer", two.run_id)]
        coordinator.connect(late)
        assert await read(late) == [("offer", two.run_id)]
        await coordinator.shut_down()

    play(scenario())


def test_a_site_takes_part_once_it_accepts_until_it_refuses_or_is_gone(play: Play):
    async def scenario() -> None:
        coordinator, north, south = coordinator_of(), session("north"), session("south")
        run = submit(coordinator, cohort={"size": 2})
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
        await coordinator.shut_down()

    play(scenario())


def test_a_site_that_connects_again_takes_over_and_what_the_old_session_says_is_nobodys(play: Play):
    async def scenario() -> None:
        coordinator, old, new = coordinator_of(), session("north"), session("north")
        run = submit(coordinator, cohort={"size": 2})
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
        await coordinator.shut_down()

    play(scenario())


def test_a_failure_counts_only_from_a_site_that_takes_part(play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        run = submit(coordinator)
        coordinator.connect(north)
        coordinator.fail(north, run.run_id, OrderId("train", 1), NO)
        coordinator.fail(north, "another", OrderId("train", 1), NO)
        await read(north)
        assert run.history.refusals == {}
        coordinator.accept(north, run.run_id)
        coordinator.fail(north, run.run_id, OrderId("train", 1), NO)
        await read(north)
        assert run.history.refusals == {"north": NO}
        await coordinator.shut_down()

    play(scenario())


def test_a_site_that_is_ready_too_late_is_told_that_the_run_is_over(play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        run = submit(coordinator)
        coordinator.connect(north)
        coordinator.stop(run.run_id)
        await read(north)
        coordinator.accept(north, run.run_id)
        assert await read(north) == [("ended", run.run_id)]
        coordinator.accept(north, "unknown")
        coordinator.refuse(north, "unknown", NO)
        await coordinator.shut_down()

    play(scenario())


def test_the_operators_limits_hold(play: Play):
    async def scenario() -> None:
        coordinator = coordinator_of(max_runs=2, max_sessions=1)
        first, _ = submit(coordinator), submit(coordinator)
        with pytest.raises(RunError, match="has its 2 open runs; stop one first"):
            submit(coordinator)
        north = session("north")
        coordinator.connect(north)
        with pytest.raises(RunError, match="has its 1 sessions"):
            coordinator.connect(session("south"))
        coordinator.connect(session("north"))  # the same site: no further one
        coordinator.stop(first.run_id)
        await read(north)
        submit(coordinator)
        await coordinator.shut_down()

    play(scenario())


def test_old_runs_are_forgotten_oldest_first_and_open_ones_never(play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(max_finished_runs=2), session("north")
        coordinator.connect(north)
        open_run = submit(coordinator)
        ended = []
        for _ in range(4):
            ended.append(submit(coordinator).run_id)
            coordinator.accept(north, ended[-1])
            coordinator.stop(ended[-1])
            await read(north)
        kept = submit(coordinator).run_id
        assert list(coordinator.runs) == [open_run.run_id, *ended[-1:], kept]
        for run_id in ended[:3]:
            with pytest.raises(RunError, match="expected the id of a run on this coordinator"):
                coordinator.find(run_id)
        coordinator.disconnect(north)  # also of the runs that are gone
        await coordinator.shut_down()

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


def test_a_strategy_that_cannot_begin_is_the_submitters_error_and_leaves_no_run(play: Play, broken: str):
    async def scenario() -> None:
        coordinator = coordinator_of(strategies=[broken])
        with pytest.raises(
            ConfigError, match="'trial_strategy:Broken' cannot begin this run: KeyError: 'weights'"
        ):
            submit(coordinator, strategy={"name": broken})
        assert coordinator.runs == {}
        with pytest.raises(FedgeError, match="is not one that this coordinator may import"):
            submit(coordinator_of(), strategy={"name": broken})

    play(scenario())


def test_a_shutdown_ends_every_session_and_every_run(play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        before = asyncio.all_tasks()
        run = submit(coordinator)
        coordinator.connect(north)
        coordinator.accept(north, run.run_id)
        await read(north)
        await coordinator.shut_down()
        assert north.closed
        assert "shutting down" in north.ended_because
        assert asyncio.all_tasks() == before

    play(scenario())


def test_an_offer_says_all_that_a_site_needs_to_decide(play: Play):
    async def scenario() -> None:
        coordinator, north = coordinator_of(), session("north")
        coordinator.connect(north)
        submit(coordinator, seed=9, rounds=4, privacy={"unit": "none", "clip": 0.5}, work={"steps": 3})
        offer: pb.Offer = north._queue[0].offer
        assert (offer.name, offer.task, offer.rounds, offer.seed) == ("a", "app:task", 4, 9)
        assert (offer.clip, offer.work.steps) == (0.5, 3)
        assert offer.strategy == repr(FedAvg())
        assert [tensor.name for tensor in offer.layout.tensors] == ["w"]
        submit(coordinator)
        assert not north._queue[1].offer.HasField("clip")
        await coordinator.shut_down()

    play(scenario())
