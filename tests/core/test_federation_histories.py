"""Generated histories of a whole run under a fake driver: joins, losses, failures, late and double answers.

The driver below does what the real ones do: it executes effects strictly in order, keeps the model's
version, the timers and what each client has in hand, and checks each effect against them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import federation
from fedge.cohort import Terms
from fedge.events import (
    Accept,
    Arrived,
    Cancel,
    Close,
    DeadlinePassed,
    Failed,
    GiveUp,
    Joined,
    Left,
    OrderId,
    Phase,
    Progressed,
    Reject,
    Send,
    StartTimer,
)
from fedge.plan import Plan
from fedge.refusal import Refusal, RefusalCode
from fedge.run_state import Finish, Returned, RunEffect, RunEvent, Stop

CLIENTS = "abcde"
NO = Refusal(RefusalCode.TASK_FAILED, "no")

Operation = tuple[str, str]
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["join", "join", "leave", "fail", "repeat", "lie"]), st.sampled_from(CLIENTS)),
    st.tuples(st.just("answer"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("answer"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("progress"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("deadline"), st.sampled_from("012")),
)
HISTORIES = st.lists(OPERATIONS, max_size=40)
RESTARTS = st.tuples(st.just("restart"), st.text(CLIENTS, max_size=len(CLIENTS)))
CRASHES = st.lists(st.one_of(OPERATIONS, OPERATIONS, OPERATIONS, RESTARTS), max_size=40)
STARTS = st.sets(st.sampled_from(CLIENTS))


@st.composite
def plans(draw: st.DrawFn, *, rounds: bool) -> Plan:
    size = draw(st.integers(1, 4))
    quorum = draw(st.integers(1, size))
    return Plan(
        rounds=draw(st.integers(1, 5)),
        kind="train" if rounds else "gradient",
        terms=Terms(size, quorum, draw(st.sampled_from([1.0, 1.5])), deadline_s=60.0, wait_s=90.0),
        seed=draw(st.integers(0, 2)),
        attempts=draw(st.integers(1, 3)),
        evaluate_every=draw(st.integers(0, 3)),
        evaluation_clients=draw(st.integers(1, 3)),
        max_staleness=None if rounds else draw(st.sampled_from([0, 1, 2, 10])),
    )


@dataclass
class Driver:
    """Executes effects, in order, and believes nothing."""

    plan: Plan
    here: set[str]
    version: int = 0
    """Training rounds closed: the model that a Send behind them carries."""
    timers: dict[tuple[OrderId, Phase], float] = field(default_factory=dict)
    hands: dict[str, list[OrderId]] = field(default_factory=dict)
    """Orders that a client has over a live link and has not answered."""
    sent: set[tuple[str, OrderId]] = field(default_factory=set)
    accepted: list[tuple[str, OrderId]] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    due: list[int] = field(default_factory=list)
    """Rounds after which the plan wants an evaluation and a client was here."""
    log: list[RunEffect] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    """Clients that count as present since the driver has started again, and have not come yet."""
    restarts: int = 0
    so_far: int = 0

    def __post_init__(self) -> None:
        self.hands = {client: [] for client in CLIENTS}
        self.run, effects = federation.begin(self.plan, frozenset(self.here))
        self.execute(effects)
        self.check()

    def do(self, operation: Operation) -> None:
        what, about = operation
        if what == "deadline":
            if self.timers:
                order, phase = sorted(self.timers, key=str)[int(about) % len(self.timers)]
                del self.timers[order, phase]
                self.feed(DeadlinePassed(order, phase))
            return
        if what == "restart":
            self.restart(lost=set(about))
            return
        hand = self.hands[about]
        match what:
            case "join":
                self.here.add(about)
                back = about in self.expected
                self.expected.discard(about)
                self.feed(Returned(about) if back else Joined(about))
            case "leave":
                self.here.discard(about)
                hand.clear()
                self.expected.discard(about)
                self.feed(Left(about))
            case "progress" if hand:
                self.so_far += 1
                self.feed(Progressed(about, hand[0], self.so_far))
            case "answer" if hand:
                self.feed(Arrived(about, hand.pop(0)))
            case "fail" if hand:
                self.feed(Failed(about, hand.pop(0), NO))
            case "repeat":  # an answer that was sent before, or that was under way when the link broke
                for order in sorted((o for c, o in self.sent if c == about and o not in hand), key=str)[-2:]:
                    self.feed(Arrived(about, order))
            case "lie":
                for order in (
                    OrderId("train", self.version + 2),
                    OrderId("gradient", self.version + 1, 7),
                    OrderId("evaluate", self.version + 1),
                    OrderId("train", max(self.version, 1), 9),
                    *(OrderId("train", o.round, o.attempt) for o in hand if o.kind == "gradient"),
                ):
                    if (about, order) not in self.sent:
                        self.feed(Arrived(about, order))
                        self.feed(Failed(about, order, NO))
                        self.feed(DeadlinePassed(order, "open"))
            case _:
                pass

    def restart(self, *, lost: set[str]) -> None:
        """The driver ends between two events and starts again, without the updates of some clients."""
        if self.run.status != "running":
            return
        self.restarts += 1
        self.timers.clear()
        for hand in self.hands.values():
            hand.clear()
        self.expected = set(self.here)
        rounds = [round for round in (self.run.training, self.run.evaluation) if round is not None]
        kept = {round.order: round.accepted - lost for round in rounds}
        unfinished = {(client, order) for order, clients in kept.items() for client in lost - clients}
        self.accepted = [pair for pair in self.accepted if pair not in unfinished]
        self.run, effects = federation.resume(self.run, kept)
        assert not [effect for effect in effects if isinstance(effect, Accept | Reject)]
        self.execute(effects)
        self.check()

    def feed(self, event: RunEvent) -> None:
        before = self.run
        self.run, effects = federation.step(before, event)
        answers = [effect for effect in effects if isinstance(effect, Accept | Reject)]
        if isinstance(event, Arrived):
            assert [(answer.client, answer.order) for answer in answers] == [(event.client, event.order)]
        else:
            assert answers == []
        if before.status != "running":
            assert self.run == before
            assert effects == tuple(answers)
            assert all(isinstance(a, Reject) and a.refusal.code == RefusalCode.RUN_ENDED for a in answers)
        self.execute(effects)
        self.check()

    def execute(self, effects: tuple[RunEffect, ...]) -> None:
        self.log += effects
        for effect in effects:
            match effect:
                case Send(client, order):
                    assert client in self.here, "sent to one who is not here"
                    held = [other for other in self.hands[client] if other.kind == order.kind]
                    assert held == [], "sent an order to one who is at work on another of that kind"
                    expected = self.version if order.kind == "evaluate" else self.version + 1
                    assert order.round == expected, "the order is not for the model that it carries"
                    if order.kind == "evaluate":
                        if order.round not in self.evaluated:
                            self.evaluated.append(order.round)
                    else:
                        assert order.kind == self.plan.kind
                        assert order.attempt <= self.plan.attempts
                    self.sent.add((client, order))
                    if client not in self.expected:
                        self.hands[client].append(order)
                case Accept(client, order, staleness):
                    assert (client, order) in self.sent, "accepted what was never asked for"
                    assert (client, order) not in self.accepted, "accepted twice"
                    self.accepted.append((client, order))
                    bound = self.plan.max_staleness
                    if bound is None or order.kind == "evaluate":
                        assert staleness == 0
                    else:
                        assert staleness == self.version + 1 - order.round
                        assert 0 <= staleness <= bound
                case Cancel(client, order):
                    assert order in self.hands[client] or client in self.expected, "it does not have that"
                    self.hands[client] = [other for other in self.hands[client] if other != order]
                case StartTimer(order, phase, seconds):
                    assert seconds in (60.0, 90.0)
                    self.timers[order, phase] = seconds
                case Close(order, clients):
                    assert clients
                    self.drop_timers(order)
                    if order.kind != "evaluate":
                        self.version += 1
                        assert order.round == self.version, "rounds are closed in order, each once"
                        if self.plan.evaluates(order.round) and self.here:
                            self.due.append(order.round)
                case GiveUp(order, reason):
                    assert reason
                    self.drop_timers(order)
                case Finish():
                    self.timers.clear()
                case _:
                    pass

    def drop_timers(self, order: OrderId) -> None:
        for key in [key for key in self.timers if key[0] == order]:
            del self.timers[key]

    def check(self) -> None:
        run = self.run
        assert run.committed == self.version
        finishes = [effect for effect in self.log if isinstance(effect, Finish)]
        if run.status == "running":
            assert finishes == []
            assert self.timers, "nothing bounds the wait"
            assert run.clients == self.here
            assert isinstance(run.waiting_for, str)
        else:
            assert len(finishes) == 1
            assert finishes[0] == self.log[-1] or isinstance(self.log[-1], Reject)
            assert (finishes[0].status, finishes[0].reason) == (run.status, run.reason)
            assert (run.reason == "") == (run.status == "done")
            assert run.waiting_for == run.reason
            assert all(hand == [] for hand in self.hands.values()), "work goes on after the end"
            assert run.committed == self.plan.rounds or run.status != "done"

    def run_out(self) -> None:
        """Let time pass: whatever timer is outstanding runs out, until the run is over."""
        for _ in range(20 * self.plan.rounds * self.plan.attempts):
            if self.run.status != "running":
                return
            order, phase = min(self.timers, key=str)
            del self.timers[order, phase]
            self.feed(DeadlinePassed(order, phase))
        raise AssertionError(f"time passes and the run goes on: {self.run}")

    def work_on(self) -> None:
        """Everybody here answers everything until the run is over; time stands still."""
        for _ in range(50 * self.plan.rounds * len(CLIENTS)):
            busy = [client for client in sorted(self.here) if self.hands[client]]
            if self.run.status != "running" or not busy:
                return
            client = min(busy, key=lambda client: str(self.hands[client][0]))
            self.do(("answer", client))
        raise AssertionError("work without end")


def check_evaluations(driver: Driver) -> None:
    assert len(set(driver.evaluated)) == len(driver.evaluated)
    assert driver.evaluated == sorted(driver.evaluated)
    if driver.plan.max_staleness is None:
        # A run that was stopped or failed may owe nothing: in rounds, evaluation follows at once.
        assert driver.evaluated == driver.due
    else:
        assert len(driver.evaluated) <= len(driver.due) + driver.restarts
        if not driver.plan.evaluate_every:
            assert driver.evaluated == []


both = pytest.mark.parametrize("rounds", [True, False], ids=["rounds", "arrivals"])


@both
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_history_ends_when_time_passes_with_its_rounds_in_order(rounds, data):
    driver = Driver(data.draw(plans(rounds=rounds)), data.draw(STARTS))
    for operation in data.draw(HISTORIES):
        driver.do(operation)
    driver.run_out()
    assert driver.run.status in ("done", "failed")
    check_evaluations(driver)
    before = driver.log[:]
    for client in CLIENTS:
        for what in ("join", "repeat", "lie", "leave"):
            driver.do((what, client))
    driver.feed(Stop())
    assert all(isinstance(effect, Reject) for effect in driver.log[len(before) :])


@both
@settings(max_examples=70, deadline=None)
@given(st.data())
def test_a_run_whose_clients_answer_is_done_without_any_deadline(rounds, data):
    plan = data.draw(plans(rounds=rounds))
    driver = Driver(plan, data.draw(STARTS))
    for what, about in data.draw(HISTORIES):
        if what in ("join", "answer", "repeat", "lie"):
            driver.do((what, about))
    for client in CLIENTS:
        driver.do(("join", client))
    driver.work_on()
    assert driver.run.status == "done"
    assert driver.version == plan.rounds
    check_evaluations(driver)
    if plan.evaluate_every:
        assert plan.rounds in driver.evaluated, "the last model is always judged"


@both
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_run_whose_driver_starts_again_and_again_ends_like_any_other(rounds, data):
    plan = data.draw(plans(rounds=rounds))
    driver = Driver(plan, data.draw(STARTS))
    for operation in data.draw(CRASHES):
        driver.do(operation)
    if data.draw(st.booleans()):
        for client in CLIENTS:
            driver.do(("join", client))
        driver.work_on()
    driver.run_out()
    assert driver.run.status in ("done", "failed")
    check_evaluations(driver)


def test_a_lost_update_of_a_client_that_had_left_before_the_driver_ended_is_not_waited_for_as_work():
    """Found by generated histories: who is gone when the driver starts again has no order to cancel."""
    driver = Driver(Plan(1, "train", Terms(2, 1, deadline_s=60.0, wait_s=90.0), attempts=1), {"a", "b"})
    for operation in (("leave", "a"), ("repeat", "a"), ("restart", "a")):
        driver.do(operation)
    assert driver.run.training is not None
    assert driver.run.training.cohort == {"a": "lost", "b": "pending"}
    driver.run_out()


@both
@settings(max_examples=70, deadline=None)
@given(st.data())
def test_a_run_can_be_stopped_at_any_time_and_everybody_is_told(rounds, data):
    driver = Driver(data.draw(plans(rounds=rounds)), data.draw(STARTS))
    for operation in data.draw(HISTORIES):
        driver.do(operation)
    if driver.run.status == "running":
        driver.feed(Stop())
        assert driver.run.status == "stopped"


@settings(max_examples=70, deadline=None)
@given(plans(rounds=True), STARTS, HISTORIES)
def test_in_rounds_an_evaluation_is_over_before_the_next_round_begins(plan, here, history):
    driver = Driver(plan, set(here))
    for operation in history:
        driver.do(operation)
    driver.run_out()
    sends = [effect.order for effect in driver.log if isinstance(effect, Send)]
    keys = [(order.round, order.kind == "evaluate", order.attempt) for order in sends]
    groups = [key for key, _ in groupby(keys)]
    assert groups == sorted(set(groups)), "orders of one kind, round and attempt are sent together"


@settings(max_examples=70, deadline=None)
@given(plans(rounds=True), STARTS, HISTORIES)
def test_a_round_is_tried_as_often_as_the_plan_says_and_each_attempt_once(plan, here, history):
    driver = Driver(plan, set(here))
    for operation in history:
        driver.do(operation)
    driver.run_out()
    given_up = [e.order for e in driver.log if isinstance(e, GiveUp) and e.order.kind == "train"]
    closed = [e.order for e in driver.log if isinstance(e, Close) and e.order.kind == "train"]
    assert max(Counter(given_up + closed).values(), default=1) == 1
    for order in given_up + closed:
        attempts = [o.attempt for o in given_up + closed if o.round == order.round]
        assert attempts == list(range(1, len(attempts) + 1))


Setting = tuple[bool, dict[str, int], str, list[Operation]]
FOUND: dict[str, Setting] = {
    "one who failed, was back and was sent a second order while at work on the first": (
        False,
        {"rounds": 5, "max_staleness": 5},
        "ab",
        [("fail", "a"), ("leave", "a"), ("join", "a"), ("answer", "b"), ("answer", "a"), ("answer", "a")],
    ),
    "one who failed and says again that it is ready": (
        False,
        {"rounds": 5, "max_staleness": 5},
        "ab",
        [("fail", "a"), ("join", "a"), ("answer", "b"), ("answer", "a"), ("answer", "a")],
    ),
    "a gradient's order answered as if it were training": (
        False,
        {"rounds": 2, "max_staleness": 1},
        "a",
        [("lie", "a"), ("answer", "a"), ("answer", "a")],
    ),
    "a last attempt that runs out cancels each client once": (
        True,
        {"rounds": 1, "attempts": 1},
        "ab",
        [("deadline", "0"), ("repeat", "a")],
    ),
    "one who joins is not asked to judge a model that is gone": (
        False,
        {"rounds": 4, "max_staleness": 0, "evaluate_every": 1, "evaluation_clients": 2},
        "a",
        [("answer", "a"), ("answer", "a"), ("join", "b"), ("answer", "b")],
    ),
    "the last at work leaves while one that failed is here": (
        False,
        {"rounds": 2, "max_staleness": 0},
        "ab",
        [("fail", "a"), ("leave", "b"), ("answer", "a"), ("answer", "a")],
    ),
}


@pytest.mark.parametrize(("rounds", "settings_", "here", "history"), FOUND.values(), ids=FOUND)
def test_histories_that_once_failed(rounds, settings_, here, history):
    plan = Plan(
        kind="train" if rounds else "gradient",
        terms=Terms(2, 2, deadline_s=60.0, wait_s=90.0),
        **settings_,  # type: ignore[arg-type]
    )
    driver = Driver(plan, set(here))
    for operation in history:
        driver.do(operation)
    driver.run_out()
