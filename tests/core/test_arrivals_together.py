"""A run that hears of many arrivals at once: the same as of one after another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedge import federation
from fedge.cohort import Terms
from fedge.events import Arrived, OrderId, Reject
from fedge.plan import Plan
from fedge.refusal import RefusalCode
from fedge.run_state import Stop

TERMS = Terms(2, 2, deadline_s=60.0, wait_s=90.0)
ROUNDS = Plan(rounds=3, kind="train", terms=TERMS, attempts=2)
ARRIVALS = Plan(rounds=4, kind="gradient", terms=TERMS, max_staleness=1)


def train(round: int) -> OrderId:
    return OrderId("train", round)


@pytest.mark.parametrize(
    ("plan", "order", "clients"),
    [
        (ROUNDS, train(1), "ab"),
        (ROUNDS, train(1), "a"),
        (ROUNDS, train(1), "aab"),
        (ROUNDS, train(1), "abc"),
        (ROUNDS, train(2), "ab"),
        (ROUNDS, OrderId("evaluate", 1), "ab"),
        (ARRIVALS, OrderId("gradient", 1), "abab"),
        (replace(ROUNDS, rounds=1), train(1), "ab"),
        (ROUNDS, train(1), ""),
    ],
)
def test_arrivals_together_are_arrivals_one_after_another(plan: Plan, order: OrderId, clients: str):
    run = federation.begin(plan, frozenset("abc"))[0]
    expected, effects = run, []
    for client in clients:
        expected, more = federation.step(expected, Arrived(client, order))
        effects += more
    found, together = federation.arrive(run, clients, order)
    assert (found, list(together)) == (expected, effects)


def test_arrivals_after_the_end_are_answered():
    run, _ = federation.step(federation.begin(ROUNDS, frozenset("ab"))[0], Stop())
    answers = federation.arrive(run, "ab", train(1))[1]
    codes = [answer.refusal.code for answer in answers if isinstance(answer, Reject)]
    assert codes == [RefusalCode.RUN_ENDED] * 2
