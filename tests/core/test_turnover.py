"""Who comes and goes while a round has all it wants is told at once, and it is the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import federation
from fedge.cohort import Terms
from fedge.events import Arrived, DeadlinePassed, Event, Failed, Joined, Left, OrderId
from fedge.plan import Plan
from fedge.refusal import Refusal, RefusalCode
from fedge.run_state import Federation
from fedge.turnover import Turnover

CLIENTS = [f"client-{at}" for at in range(9)]
SPENT = Refusal(RefusalCode.BUDGET_EXHAUSTED, "no more")

plans = st.builds(
    Plan,
    st.just(9),
    st.just("train"),
    st.builds(
        Terms,
        st.just(3),
        st.integers(1, 3),
        over_select=st.sampled_from([1.0, 1.4]),
        deadline_s=st.just(60.0),
    ),
    evaluate_every=st.sampled_from([0, 2]),
    max_participations=st.sampled_from([None, 2]),
    attempts=st.just(9),
)
happenings = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "arrive", "join", "leave", "arrive", "arrive", "fail", "wait"]),
        st.sampled_from(CLIENTS),
    ),
    min_size=30,
    max_size=150,
)


def event(run: Federation, what: str, client: str) -> Event | None:
    """As somebody might hear it now; clients that are there do not join."""
    round = run.training or run.evaluation
    if what == "join":
        return Joined(client) if client not in run.clients else None
    if what == "leave":
        return Left(client) if client in run.clients else None
    if round is None:
        return None
    if what == "wait":
        return DeadlinePassed(round.order, "open" if round.phase == "open" else "waiting")
    at_work = sorted(round.pending)
    if not at_work:
        return None
    return Arrived(at_work[0], round.order) if what == "arrive" else Failed(at_work[0], round.order, SPENT)


@given(plan=plans, here=st.sets(st.sampled_from(CLIENTS), min_size=6), history=happenings)
@settings(max_examples=300, deadline=None)
def test_who_comes_and_goes_is_told_at_once_to_the_same_state(plan: Plan, here: set[str], history: Any):
    one, _ = federation.begin(plan, frozenset(here))
    other, turnover = one, Turnover()
    for what, client in history:
        happened = event(one, what, client)
        if happened is None:
            continue
        one, effects = federation.step(one, happened)
        if turnover.take(other, happened):
            assert not effects
            continue
        other = turnover.applied(other)
        other, as_much = federation.step(other, happened)
        assert as_much == effects
        assert other == one
    assert turnover.applied(other) == one


def open_run(cohort: int = 2, quorum: int = 1) -> Federation:
    return federation.begin(Plan(1, "train", Terms(cohort, quorum)), frozenset(CLIENTS))[0]


def test_those_who_are_at_work_and_other_events_are_not_for_it():
    run, turnover = open_run(), Turnover()
    assert run.training is not None
    asked = sorted(run.training.pending)
    idle = next(each for each in CLIENTS if each not in asked)
    assert not turnover.take(run, Left(asked[0]))
    assert not turnover.take(run, Arrived(asked[0], OrderId("train", 1)))
    assert turnover.take(run, Left(idle))
    assert idle not in turnover.applied(run).clients
    assert turnover.applied(run) is run, "they are told once"


@pytest.mark.parametrize(
    "run",
    [
        open_run(10, 10),
        open_run(10, 1),
        federation.fail(open_run(), "over")[0],
        federation.begin(Plan(1, "train", Terms(2, 1), max_staleness=3), frozenset(CLIENTS))[0],
        federation.step(open_run(), Left(CLIENTS[0]))[0],
    ],
    ids=["waits", "wants more", "is over", "has no rounds", "goes on"],
)
def test_a_run_that_may_ask_whoever_comes_hears_of_each(run: Federation):
    may = run.training is not None and len(run.training.pending) == 2
    assert Turnover().take(run, Joined("another")) is may
    assert not Turnover(noted=False).take(run, Joined("another"))


def test_one_that_has_had_its_turns_may_still_judge_when_it_comes_back():
    plan = Plan(3, "train", Terms(2, 1), evaluate_every=1, max_participations=1)
    run = federation.begin(plan, frozenset(CLIENTS[:2]))[0]
    first, second = CLIENTS[:2]
    order = OrderId("train", 1)
    for happened in (Arrived(first, order), Left(first), Arrived(second, order)):
        run = federation.step(run, happened)[0]
    assert run.evaluation is not None
    turnover = Turnover()
    assert turnover.take(run, Joined(first))
    assert turnover.applied(run) == federation.step(run, Joined(first))[0]
