"""Who may be asked how often: a run in which a site's turns are limited uses them up evenly, and no further."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import federation
from fedge.cohort import Terms
from fedge.errors import ConfigError
from fedge.events import Accept, Arrived, DeadlinePassed, Failed, Joined, OrderId, Send
from fedge.plan import Plan
from fedge.refusal import Refusal, RefusalCode
from fedge.run_state import Federation, RunEffect


@st.composite
def plans(draw: st.DrawFn, *, in_rounds: bool = True, whole: bool = False) -> Plan:
    rounds, size = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    return Plan(
        rounds=rounds,
        kind="train" if in_rounds else "gradient",
        terms=Terms(
            size, size if whole else draw(st.integers(1, size)), 1.0 if whole or not in_rounds else 1.5
        ),
        seed=draw(st.integers(0, 5)),
        max_staleness=None if in_rounds else 100,
        max_participations=draw(st.none() | st.integers(1, rounds)),
        separation=draw(st.integers(1, 4)) if in_rounds else 1,
    )


@dataclass
class Obedient:
    """Clients that do everything they are asked, at once and in order; `turns` is when each one's counted."""

    plan: Plan
    count: int
    turns: dict[str, list[int]] = field(default_factory=dict)
    run: Federation = field(init=False)

    def __post_init__(self) -> None:
        names = [f"client-{number}" for number in range(self.count)]
        self.run, effects = federation.begin(self.plan, frozenset(names))
        self.go(effects)

    def go(self, effects: tuple[RunEffect, ...]) -> None:
        asked = [effect for effect in effects if isinstance(effect, Send)]
        while asked:
            send = asked.pop(0)
            self.run, more = federation.step(self.run, Arrived(send.client, send.order))
            for effect in more:
                if isinstance(effect, Accept):
                    self.turns.setdefault(effect.client, []).append(effect.order.round)
            asked += [effect for effect in more if isinstance(effect, Send)]


@given(plans(whole=True), st.integers(0, 5))
def test_enough_clients_come_to_the_end_and_nobody_has_too_many_turns_or_too_soon(plan: Plan, more: int):
    done = Obedient(plan, plan.fewest_clients + more)
    assert done.run.status == "done"
    for turns in done.turns.values():
        assert len(turns) <= (plan.max_participations or plan.rounds)
        assert all(later - earlier >= plan.separation for earlier, later in pairwise(turns))
    if plan.max_participations is not None and plan.separation == 1:
        taken = [len(done.turns.get(name, ())) for name in sorted(done.run.clients)]
        assert max(taken) - min(taken) <= 1


@given(plans().filter(lambda plan: plan.fewest_clients > 1))
def test_one_client_less_is_not_enough_and_it_says_who_is_here_and_may_not_be_asked(plan: Plan):
    short = Obedient(plan, plan.fewest_clients - 1)
    assert short.run.status == "running"
    assert "waiting for clients" in short.run.waiting_for
    limited = short.run.committed > 0
    assert limited == ("privacy.max_participations" in short.run.waiting_for)
    with pytest.raises(ConfigError, match=f"at least {plan.fewest_clients} clients"):
        plan.check_population(plan.fewest_clients - 1)
    plan.check_population(plan.fewest_clients)


@given(plans(in_rounds=False), st.integers(0, 3))
def test_without_rounds_turns_are_limited_too(plan: Plan, more: int):
    done = Obedient(plan, plan.fewest_clients + more)
    assert done.run.status == "done"
    most = plan.max_participations or plan.rounds
    assert max(Counter({name: len(turns) for name, turns in done.turns.items()}).values()) <= most


def test_without_rounds_a_run_whose_clients_have_had_their_turns_waits_for_others():
    plan = Plan(rounds=3, kind="gradient", terms=Terms(1, 1), max_staleness=0, max_participations=1)
    short = Obedient(plan, 2)
    assert short.run.committed == 2
    assert short.run.waiting_for.startswith(
        "waiting for clients: none is at work; 2 of the 2 that are here may not"
    )
    ended, _ = federation.step(short.run, DeadlinePassed(OrderId("gradient", 3), "waiting"))
    assert "2 of the 2 that are here may not be asked now" in ended.reason
    another, effects = federation.step(short.run, Joined("one-more"))
    assert Send("one-more", OrderId("gradient", 3)) in effects
    done, _ = federation.step(another, Arrived("one-more", OrderId("gradient", 3)))
    assert done.status == "done"


def test_a_run_that_ends_for_want_of_turns_says_so():
    plan = Plan(rounds=4, kind="train", terms=Terms(2, 2), max_participations=1)
    short = Obedient(plan, 3)
    ended, _ = federation.step(short.run, DeadlinePassed(OrderId("train", 2), "waiting"))
    assert ended.status == "failed"
    assert "1 of at least 2 clients after" in ended.reason
    assert "2 of the 3 that are here may not be asked now" in ended.reason


def test_those_with_the_fewest_turns_are_asked_first_also_where_they_join_while_a_round_waits():
    plan = Plan(rounds=9, kind="train", terms=Terms(2, 2), max_participations=9)
    run = Federation(plan, committed=4, taken={"a": (4, 4), "b": (3, 4), "c": (2, 3), "d": (2, 3)})
    run, _ = federation.resume(run, {})
    run, _ = federation.step(run, Joined("a"))
    _, effects = federation.step(run, Joined("b"))
    assert [effect.client for effect in effects if isinstance(effect, Send)] == ["b", "a"]
    later = replace(run, clients=frozenset("abcd"), training=None)
    _, effects = federation.resume(later, {})
    assert {effect.client for effect in effects if isinstance(effect, Send)} == {"c", "d"}


EXHAUSTED = Refusal(RefusalCode.BUDGET_EXHAUSTED, "no more")


def test_who_has_spent_its_budget_is_not_asked_again_until_it_comes_anew():
    """Found by a run that failed: one such site was alone for a moment, and used up all attempts in no time."""
    plan = Plan(rounds=2, kind="train", terms=Terms(1, 1), attempts=2)
    run, _ = federation.begin(plan, frozenset("a"))
    run, effects = federation.step(run, Failed("a", OrderId("train", 1), EXHAUSTED))
    assert not [effect for effect in effects if isinstance(effect, Send)]
    assert run.waiting_for.startswith(
        "waiting for clients: 0 of 1 are ready; 1 of the 1 that are here may not"
    )
    _, effects = federation.step(run, Joined("a"))
    assert Send("a", OrderId("train", 1, 2)) in effects
    run, effects = federation.step(run, Joined("b"))
    assert Send("b", OrderId("train", 1, 2)) in effects
    run, effects = federation.step(run, Arrived("b", OrderId("train", 1, 2)))
    assert [effect.client for effect in effects if isinstance(effect, Send)] == ["b"]


def test_without_rounds_who_has_spent_its_budget_is_not_asked_again_either():
    plan = Plan(rounds=3, kind="gradient", terms=Terms(1, 1), max_staleness=5, attempts=3)
    run, _ = federation.begin(plan, frozenset("ab"))
    run, _ = federation.step(run, Failed("a", OrderId("gradient", 1), EXHAUSTED))
    run, effects = federation.step(run, Arrived("b", OrderId("gradient", 1)))
    assert [effect.client for effect in effects if isinstance(effect, Send)] == ["b"]
    run, effects = federation.step(run, Failed("b", OrderId("gradient", 2), EXHAUSTED))
    assert (run.status, run.at_work) == ("running", frozenset())
    assert "2 of the 2 that are here may not be asked now" in run.waiting_for


def test_who_was_asked_in_an_attempt_that_was_given_up_rests_as_if_it_had_counted():
    """It may have handed in: then its own ledger lets it rest, and refuses what comes too soon."""
    plan = Plan(rounds=6, kind="train", terms=Terms(2, 2), seed=3, attempts=3, separation=2)
    run, effects = federation.begin(plan, frozenset(f"c{number}" for number in range(8)))
    asked = [effect.client for effect in effects if isinstance(effect, Send)]
    run, _ = federation.step(run, Arrived(asked[0], OrderId("train", 1)))
    run, effects = federation.step(run, DeadlinePassed(OrderId("train", 1), "open"))
    second = OrderId("train", 1, 2)
    for client in [effect.client for effect in effects if isinstance(effect, Send)]:
        run, effects = federation.step(run, Arrived(client, second))
    asked_next = {effect.client for effect in effects if isinstance(effect, Send)}
    assert len(asked_next) == 2
    assert not asked_next & {*asked, *run.previous.accepted}
    assert all(run.taken[client] == (0, 1) for client in set(asked) - run.previous.accepted)
