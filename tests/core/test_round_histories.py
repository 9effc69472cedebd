"""Generated histories of a round: whatever happens in whatever order, these invariants hold.

A history is a list of small operations, so that a failing one shrinks to a few lines; a found bug stays
here as its literal list.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.cohort import Round, Terms
from fedge.events import (
    Accept,
    Arrived,
    Cancel,
    Close,
    DeadlinePassed,
    Effect,
    Event,
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
from fedge.refusal import Refusal, RefusalCode
from fedge.round import arrive, open_round, step

ORDER = OrderId("train", 2, 2)
OLD = replace(ORDER, attempt=1)
CLIENTS = "abcdef"
NO = Refusal(RefusalCode.TASK_FAILED, "no")

Operation = tuple[str, str]
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["join", "leave", "arrive", "arrive", "fail"]), st.sampled_from(CLIENTS)),
    st.tuples(st.just("arrive old"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("progress"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("deadline"), st.sampled_from(["waiting", "open"])),
)
HISTORIES = st.lists(OPERATIONS, max_size=25)
STARTS = st.sets(st.sampled_from(CLIENTS))


@st.composite
def some_terms(draw: st.DrawFn) -> Terms:
    size = draw(st.integers(1, 4))
    over_select = draw(st.sampled_from([1.0, 1.0, 1.3, 2.0]))
    return Terms(size, draw(st.integers(1, size)), over_select, deadline_s=60.0, wait_s=90.0)


@dataclass
class World:
    """A round, and what its driver and its clients know; every step checks the invariants."""

    terms: Terms
    here: set[str]
    seed: int = 0
    round: Round = field(init=False)
    timers: set[tuple[OrderId, Phase]] = field(default_factory=set)
    holding: set[str] = field(default_factory=set)
    """Clients that have the order and a live link."""
    asked: set[str] = field(default_factory=set)
    cut_off: set[str] = field(default_factory=set)
    stood_still: set[str] = field(default_factory=set)
    log: list[Effect] = field(default_factory=list)
    so_far: int = 0

    def __post_init__(self) -> None:
        self.round, effects = open_round(ORDER, self.terms, self.here, seed=self.seed)
        self.execute(effects)
        self.check_state()

    def do(self, operation: Operation) -> None:
        what, about = operation
        match what:
            case "join":
                self.here.add(about)
                self.feed(Joined(about))
            case "leave":
                self.here.discard(about)
                self.cut_off |= self.holding & {about}
                self.holding.discard(about)
                self.feed(Left(about))
            case "arrive":
                self.feed(Arrived(about, ORDER))
            case "arrive old":
                self.feed(Arrived(about, OLD))
            case "progress":
                self.so_far += 1
                self.feed(Progressed(about, ORDER, self.so_far))
            case "fail":
                self.feed(Failed(about, ORDER, NO))
            case "deadline" if about == "waiting" or about == "open":
                if (ORDER, about) in self.timers:
                    self.timers.remove((ORDER, about))
                    self.feed(DeadlinePassed(ORDER, about))

    def feed(self, event: Event) -> None:
        before = self.round
        self.round, effects = step(before, event)
        self.stood_still |= self.round.stalled
        answers = [effect for effect in effects if isinstance(effect, Accept | Reject)]
        if isinstance(event, Arrived):
            assert [(answer.client, answer.order) for answer in answers] == [(event.client, event.order)]
            if isinstance(answers[0], Accept):
                assert event.order == ORDER
                assert event.client in before.pending | before.lost
        else:
            assert answers == []
        if before.phase in ("closed", "abandoned"):
            assert self.round == before
            assert effects == tuple(answers)
        self.execute(effects)
        self.check_state()

    def execute(self, effects: tuple[Effect, ...]) -> None:
        self.log += effects
        for effect in effects:
            match effect:
                case Send(client, order):
                    assert order == ORDER
                    assert client in self.here, "sent to one who is not here"
                    assert client not in self.holding, "sent twice over one link"
                    self.holding.add(client)
                    self.asked.add(client)
                case Accept(client, _):
                    assert client in self.asked
                    self.holding.discard(client)
                case Cancel(client, order):
                    assert order == ORDER
                    assert client in self.holding, "cancelled what it does not have"
                    self.holding.discard(client)
                case StartTimer(order, phase, seconds):
                    assert order == ORDER
                    assert seconds == {"waiting": 90.0, "open": 60.0}[phase]
                    self.timers.add((order, phase))
                case Close(order, clients):
                    assert order == ORDER
                    assert clients == tuple(sorted(self.round.accepted))
                case GiveUp(order, reason):
                    assert order == ORDER
                    assert reason
                case _:
                    pass

    def check_state(self) -> None:
        round, terms = self.round, self.terms
        groups = (round.pending, round.accepted, round.lost, round.failed)
        assert sum(map(len, groups)) == len(frozenset().union(*groups)), "in two groups at once"
        assert frozenset().union(*groups) == self.asked, "every client that was asked is in a group"
        assert len(round.accepted) <= terms.size
        accepts = Counter(effect.client for effect in self.log if isinstance(effect, Accept))
        assert accepts == Counter(round.accepted)
        assert len(round.candidates) == len(set(round.candidates))
        ends = [type(effect) for effect in self.log if isinstance(effect, Close | GiveUp)]
        match round.phase:
            case "waiting":
                assert ends == []
                assert self.asked == set()
                assert round.present == len(self.here) < terms.quorum
                assert (ORDER, "waiting") in self.timers
            case "open":
                assert ends == []
                assert (ORDER, "open") in self.timers
                assert len(round.accepted) < terms.size
                assert round.pending <= self.here
                assert round.stalled == round.lost & self.here, (
                    "one who came back was not sent its order again"
                )
                assert round.moving <= round.pending | round.accepted | round.failed
                self.check_work()
            case "closed":
                assert ends == [Close]
                assert len(round.accepted) >= terms.quorum
            case "abandoned":
                assert ends == [GiveUp]
                assert len(round.accepted) < terms.quorum

    def check_work(self) -> None:
        """Nobody who could be of use stands by; nobody is asked in vain."""
        round, terms = self.round, self.terms
        busy = len(round.pending) + len(round.accepted)
        if busy < terms.asked:
            assert self.here <= self.asked, "a client stands by while the cohort is short"
        # One who was cut off is replaced, and may yet deliver or come back.
        assert busy <= terms.asked + len(self.cut_off | self.stood_still)
        if not round.pending:
            could_be = len(round.accepted) + len(round.lost)
            assert len(round.accepted) < terms.quorum <= could_be, "waits for nothing"

    def run_out(self) -> None:
        """Let time pass: every timer that is outstanding runs out."""
        while self.timers:
            order, phase = min(self.timers, key=str)
            self.timers.remove((order, phase))
            self.feed(DeadlinePassed(order, phase))
        assert self.round.phase in ("closed", "abandoned")


@settings(max_examples=300, deadline=None)
@given(some_terms(), STARTS, HISTORIES, st.integers(0, 3))
def test_whatever_happens_the_invariants_hold_and_the_round_ends_when_time_passes(terms, here, history, seed):
    world = World(terms, set(here), seed)
    for operation in history:
        world.do(operation)
    world.run_out()
    for operation in history:  # the end is the end
        world.do(operation)


@settings(max_examples=120, deadline=None)
@given(some_terms(), STARTS, st.lists(OPERATIONS.filter(lambda o: o[0] != "leave"), max_size=25))
def test_clients_that_stay_and_answer_close_the_round_without_any_deadline(terms, here, history):
    world = World(terms, set(here))
    for operation in history:
        if operation[0] not in ("fail", "deadline"):
            world.do(operation)
    for client in CLIENTS:
        world.do(("join", client))
    while world.round.phase == "open":
        world.do(("arrive", min(world.round.pending)))
    assert world.round.phase == "closed"


@settings(max_examples=100, deadline=None)
@given(some_terms(), st.permutations(sorted(CLIENTS)), HISTORIES)
def test_the_order_in_which_clients_are_given_changes_nothing(terms, order, history):
    def events(world_order: list[str]) -> list[object]:
        round, effects = open_round(ORDER, terms, world_order, seed=5)
        out: list[object] = [effects]
        for what, about in history:
            if what in ("arrive", "fail"):
                event = Arrived(about, ORDER) if what == "arrive" else Failed(about, ORDER, NO)
                round, effects = step(round, event)
                out += [round, effects]
        return out

    assert events(list(order)) == events(sorted(CLIENTS))


FOUND: dict[str, tuple[Terms, str, list[Operation]]] = {
    "one who was away while others were asked is asked when it is back": (
        Terms(2, 1, deadline_s=60.0, wait_s=90.0),
        "abcd",
        [
            *(("leave", client) for client in CLIENTS),
            *(("join", client) for client in "abcd"),
            *(("leave", client) for client in "dcb"),
            *(("join", client) for client in "bcd"),
        ],
    ),
    "one who was replaced delivers all the same": (
        Terms(2, 1, deadline_s=60.0, wait_s=90.0),
        "abc",
        [("leave", "b"), ("arrive", "b"), ("arrive", "a"), ("arrive", "c")],
    ),
    "all leave, all come back, all answer": (
        Terms(3, 3, deadline_s=60.0, wait_s=90.0),
        "abc",
        [(what, client) for what in ("leave", "join", "arrive", "arrive old") for client in "abc"],
    ),
    "all fail after some have left": (
        Terms(2, 2, 2.0, deadline_s=60.0, wait_s=90.0),
        "abcd",
        [("leave", "a"), ("leave", "b"), *(("fail", client) for client in "abcd"), ("join", "a")],
    ),
}


@pytest.mark.parametrize(("terms", "here", "history"), FOUND.values(), ids=FOUND)
def test_histories_that_once_failed(terms, here, history):
    for seed in range(6):
        world = World(terms, set(here), seed)
        for operation in history:
            world.do(operation)
        world.run_out()


def event_of(operation: Operation) -> Event:
    what, whom = operation
    match what:
        case "join":
            return Joined(whom)
        case "leave":
            return Left(whom)
        case "arrive":
            return Arrived(whom, ORDER)
        case "arrive old":
            return Arrived(whom, OLD)
        case "fail":
            return Failed(whom, ORDER, NO)
        case "progress":
            return Progressed(whom, ORDER, 500)
        case _:
            return DeadlinePassed(ORDER, "open" if whom == "open" else "waiting")


@settings(max_examples=400, deadline=None)
@given(some_terms(), STARTS, HISTORIES, st.lists(st.sampled_from(CLIENTS), max_size=5))
def test_arrivals_together_are_arrivals_one_after_another(
    terms: Terms, here: set[str], history: list[Operation], clients: list[str]
):
    round, _ = open_round(ORDER, terms, here, seed=0)
    for operation in history:
        round, _ = step(round, event_of(operation))
    expected, effects = round, []
    for client in clients:
        expected, more = step(expected, Arrived(client, ORDER))
        effects += more
    together = arrive(round, clients)
    if together is not None:
        assert together[0] == expected
        assert list(together[1]) == effects
    can = round.phase == "open" and len(set(clients)) == len(clients) and {*clients} <= round.pending
    assert (together is not None) == (can and len(round.accepted) + len(clients) <= terms.size)
