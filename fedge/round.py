"""The life of one round, sans-IO: `step(round, event) -> (round, effects)`.

No clock, no socket, no randomness: time arrives as `DeadlinePassed`, and who is asked follows from a
keyed hash of the seed. The coordinator and the simulator drive this same machine.

    waiting   too few clients are here yet          (owner of the wait: a timer of `wait_s`)
    open      a cohort has its orders               (a timer of `deadline_s`)
    closed    enough updates were accepted          (final)
    abandoned it could not be completed             (final)

A deadline is about progress. A round that lacks its quorum when its time is over goes on as long as
somebody's work does, and without those whose work stands still: a slow client with a large model or a long
epoch needs no setting. `MAX_EXTENSIONS` bounds even a client that lies about it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

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

MAX_EXTENSIONS: Final = 1000
"""How often a round may outlive its deadline, for progress of a thousandth of the work each."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How many are asked, how many are enough, how long they have.

    `ceil(size * over_select)` clients are asked. The round closes when `size` updates are in, or when
    nobody is left to wait for or the deadline passes with at least `quorum`. With fewer, it goes on at the
    deadline if one of those at work has made progress since the last one.
    """

    size: int
    quorum: int
    over_select: float = 1.0
    deadline_s: float = 600.0
    wait_s: float = 3600.0

    @property
    def asked(self) -> int:
        # Rounded first: 100 * 1.1 is a hair above 110 in binary, and 111 are not what was meant.
        return math.ceil(round(self.size * self.over_select, 6))


@dataclass(frozen=True, slots=True)
class Round:
    """One round's state. A client is in at most one of pending, accepted, lost and failed.

    `candidates` are ranked by a keyed hash; those before `cursor` were asked. Of the others, those in
    `away` have left for now. `progress` is how far those at work have come, in thousandths; those in
    `moving` have come further since the timer was started. Of the lost, those in `stalled` have their
    link, but stood still for a whole deadline. `turns` is how often each took part before, where that matters.
    """

    order: OrderId
    terms: Terms
    seed: int
    phase: Phase = "waiting"
    candidates: tuple[str, ...] = ()
    cursor: int = 0
    away: frozenset[str] = frozenset()
    pending: frozenset[str] = frozenset()
    accepted: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    progress: frozenset[tuple[str, int]] = frozenset()
    moving: frozenset[str] = frozenset()
    stalled: frozenset[str] = frozenset()
    extensions: int = 0
    last_refusal: Refusal | None = None
    turns: Mapping[str, int] = field(default_factory=dict)

    @property
    def present(self) -> int:
        """Clients that are here and could be asked."""
        return len(self.candidates) - self.cursor - len(self.away)

    @property
    def at_work(self) -> list[str]:
        """Those who have the order and a link, by name."""
        return sorted(self.pending | self.stalled)

    @property
    def cohort(self) -> dict[str, str]:
        """Who was asked, and what became of it."""
        groups = (("pending", self.pending), ("accepted", self.accepted), ("lost", self.lost))
        return {
            client: name for name, group in (*groups, ("failed", self.failed)) for client in sorted(group)
        }


Step = tuple[Round, tuple[Effect, ...]]


def open_round(
    order: OrderId,
    terms: Terms,
    clients: Collection[str],
    *,
    seed: int,
    turns: Mapping[str, int] = MappingProxyType({}),
) -> Step:
    """Begin a round among `clients`: it opens at once if they are enough, else it waits for more.

    `turns` says how often a client was part of one before, 0 if nothing: those with fewer are asked first.
    """
    waiting = _ranked(Round(order, terms, seed, candidates=tuple(clients), turns=dict(turns)))
    if waiting.present >= terms.quorum:
        return _open(waiting)
    return waiting, (StartTimer(order, "waiting", terms.wait_s),)


def rank(seed: int, order: OrderId, client: str) -> bytes:
    """A client's place in the draw: a hash keyed by seed and order, so that anybody can recompute it."""
    text = f"{seed}\0{order.kind}\0{order.round}\0{order.attempt}\0{client}"
    return hashlib.sha256(text.encode()).digest()


def _ranked(round: Round) -> Round:
    """The same with its candidates in the order of the draw."""

    def place(client: str) -> tuple[int, bytes]:
        return round.turns.get(client, 0), rank(round.seed, round.order, client)

    return replace(round, candidates=tuple(sorted(round.candidates, key=place)))


def step(round: Round, event: Event) -> Step:
    """The table of transitions: (phase, event) -> what happens. Pairs not in it change nothing."""
    if isinstance(event, Joined | Left) or event.order == round.order:
        transition = _TABLE.get((round.phase, type(event)))
        return transition(round, event) if transition else (round, ())
    if isinstance(event, Arrived):  # for another round, or another attempt at this one
        return round, (Reject(event.client, event.order, _not_asked(event.order)),)
    return round, ()


def resume(round: Round, kept: Collection[str]) -> Step:
    """Go on with a round whose driver has started again; of the accepted, `kept` have their updates still.

    Everybody who was at work counts as at work until `Left` says otherwise: so the cohort stays what it
    was. Clocks start anew.
    """
    if round.phase == "waiting":
        return round, (StartTimer(round.order, "waiting", round.terms.wait_s),)
    if round.phase != "open":
        return round, ()
    gone = round.accepted - frozenset(kept)
    round = replace(round, accepted=round.accepted - gone, pending=round.pending | gone)
    round, effects = _settle(round)
    timer = (StartTimer(round.order, "open", round.terms.deadline_s),) if round.phase == "open" else ()
    return round, (*effects, *timer)


def seal(round: Round) -> Round:
    """Ask nobody else from now on: the model that this round's orders carry is no longer the current one."""
    return replace(round, candidates=round.candidates[: round.cursor], away=frozenset())


def _open(round: Round) -> Step:
    round = replace(round, phase="open")
    round, sends = _ask(round)
    return round, (*sends, StartTimer(round.order, "open", round.terms.deadline_s))


def _ask(round: Round) -> Step:
    """Ask candidates, best rank first, until as many are at work or done as the terms want."""
    wanted = round.terms.asked - len(round.pending) - len(round.accepted)
    chosen: list[str] = []
    skipped: list[str] = []
    at = round.cursor
    while at < len(round.candidates) and len(chosen) < wanted:
        client = round.candidates[at]
        (skipped if client in round.away else chosen).append(client)
        at += 1
    if not chosen:
        return round, ()
    candidates = round.candidates
    if skipped:  # those who are away keep a place behind the cursor: they can be asked when they are back
        candidates = (*candidates[: round.cursor], *chosen, *skipped, *candidates[at:])
    asked = replace(
        round,
        candidates=candidates,
        cursor=round.cursor + len(chosen),
        pending=round.pending | frozenset(chosen),
    )
    return asked, tuple(Send(client, round.order) for client in chosen)


def _joined(round: Round, event: Joined) -> Step:
    client = event.client
    if client in round.lost - round.stalled:
        back = replace(round, lost=round.lost - {client}, pending=round.pending | {client})
        return back, (Send(client, round.order),)
    if client in round.away:
        round = replace(round, away=round.away - {client})
    elif client in round.candidates:
        return round, ()
    else:
        round = replace(round, candidates=(*round.candidates, client))
    if round.phase == "open":
        return _ask(round)
    if round.present < round.terms.quorum:
        return round, ()
    return _open(_ranked(round))


def _left(round: Round, event: Left) -> Step:
    client = event.client
    if client in round.pending:
        lost = replace(
            round,
            pending=round.pending - {client},
            lost=round.lost | {client},
            progress=_others(round, client),
            moving=round.moving - {client},
        )
        return _settle(lost)
    if client in round.stalled:
        return replace(round, stalled=round.stalled - {client}, progress=_others(round, client)), ()
    if client in round.candidates[round.cursor :]:
        return _settle(replace(round, away=round.away | {client}))
    return round, ()


def _arrived(round: Round, event: Arrived) -> Step:
    client = event.client
    if client in round.accepted:
        refusal = Refusal(RefusalCode.DUPLICATE, f"this client's update for the {round.order} was accepted")
        return round, (Reject(client, round.order, refusal),)
    if client not in round.pending and client not in round.lost:
        return round, (Reject(client, round.order, _not_asked(round.order)),)
    accepted = replace(
        round,
        pending=round.pending - {client},
        lost=round.lost - {client},
        stalled=round.stalled - {client},
        accepted=round.accepted | {client},
    )
    settled, effects = _settle(accepted)
    return settled, (Accept(client, round.order), *effects)


def _failed(round: Round, event: Failed) -> Step:
    client = event.client
    if client not in round.pending and client not in round.lost:
        return round, ()
    failed = replace(
        round,
        pending=round.pending - {client},
        lost=round.lost - {client},
        stalled=round.stalled - {client},
        failed=round.failed | {client},
        last_refusal=event.refusal,
    )
    return _settle(failed)


def _progressed(round: Round, event: Progressed) -> Step:
    client = event.client
    if client not in round.pending and client not in round.stalled:
        return round, ()
    if event.permille <= dict(round.progress).get(client, 0):
        return round, ()
    # One that stood still for a whole deadline counts as lost; if its work goes on after all, it is at work.
    moved = replace(
        round,
        pending=round.pending | {client},
        lost=round.lost - {client},
        stalled=round.stalled - {client},
        progress=_others(round, client) | {(client, min(event.permille, 1000))},
        moving=round.moving | {client},
    )
    return moved, ()


def _others(round: Round, client: str) -> frozenset[tuple[str, int]]:
    return frozenset(pair for pair in round.progress if pair[0] != client)


def _settle(round: Round) -> Step:
    """After a change: replace who is lost, and close or give up if the outcome is known."""
    if round.phase != "open":
        return round, ()
    if len(round.accepted) >= round.terms.size:
        return _close(round)
    round, sends = _ask(round)
    if round.pending:
        return round, sends
    if len(round.accepted) >= round.terms.quorum:
        return _close(round)
    if len(round.accepted) + len(round.lost) >= round.terms.quorum:
        return round, sends  # those who were cut off or stand still may go on before the deadline
    why = f"; the last one said: {round.last_refusal}" if round.last_refusal else ""
    reason = (
        f"{len(round.accepted)} of at least {round.terms.quorum} updates, "
        f"{len(round.failed)} clients failed and nobody else is here{why}"
    )
    return replace(round, phase="abandoned"), (*_cancels(round), GiveUp(round.order, reason))


def _close(round: Round) -> Step:
    effects: list[Effect] = [*_cancels(round)]
    effects.append(Close(round.order, tuple(sorted(round.accepted))))
    return replace(round, phase="closed"), tuple(effects)


def _late(round: Round, event: Arrived) -> Step:
    if event.client in round.accepted:
        return _arrived(round, event)
    asked = event.client in round.pending | round.lost | round.failed
    refusal = _too_late(round.order) if asked else _not_asked(round.order)
    return round, (Reject(event.client, round.order, refusal),)


def _deadline(round: Round, event: DeadlinePassed) -> Step:
    if event.phase != round.phase:
        return round, ()  # the timer of an earlier phase
    if len(round.accepted) >= round.terms.quorum:
        return _close(round)
    if round.phase == "open" and round.pending & round.moving and round.extensions < MAX_EXTENSIONS:
        return _extend(round)
    cancels = _cancels(round)
    if round.phase == "waiting":
        reason = f"{round.present} of at least {round.terms.quorum} clients after {round.terms.wait_s:g} s"
    else:
        reason = (
            f"{len(round.accepted)} of at least {round.terms.quorum} updates "
            f"after {round.terms.deadline_s:g} s"
        )
    return replace(round, phase="abandoned"), (*cancels, GiveUp(round.order, reason))


def _cancels(round: Round) -> tuple[Effect, ...]:
    return tuple(Cancel(client, round.order) for client in round.at_work)


def _extend(round: Round) -> Step:
    """Go on with those whose work goes on, and with others in place of those whose work stands still."""
    still = round.pending - round.moving
    round = replace(
        round,
        pending=round.pending - still,
        lost=round.lost | still,
        stalled=round.stalled | still,
        moving=frozenset(),
        extensions=round.extensions + 1,
    )
    round, sends = _settle(round)
    return round, (*sends, StartTimer(round.order, "open", round.terms.deadline_s))


def _too_late(order: OrderId) -> Refusal:
    return Refusal(RefusalCode.LATE, f"the {order} was complete or given up before this update arrived")


def _not_asked(order: OrderId) -> Refusal:
    return Refusal(RefusalCode.NOT_ASKED, f"this client was not asked for the {order}")


# Each transition takes the event type of its own key, which a dict's type cannot say: hence Any.
_TABLE: dict[tuple[Phase, type[Event]], Callable[[Round, Any], Step]] = {
    ("waiting", Joined): _joined,
    ("waiting", Left): _left,
    ("waiting", Arrived): _arrived,
    ("waiting", DeadlinePassed): _deadline,
    ("open", Joined): _joined,
    ("open", Left): _left,
    ("open", Arrived): _arrived,
    ("open", Failed): _failed,
    ("open", Progressed): _progressed,
    ("open", DeadlinePassed): _deadline,
    ("closed", Arrived): _late,
    ("abandoned", Arrived): _late,
}
