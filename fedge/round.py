"""The life of one round, sans-IO: `step(round, event) -> (round, effects)`.

No clock, no socket, no randomness: time arrives as `DeadlinePassed`, and who is asked follows from a
keyed hash of the seed. The coordinator and the simulator drive this same machine.

    waiting   too few clients are here yet          (owner of the wait: a timer of `wait_s`)
    open      a cohort has its orders               (a timer of `deadline_s`)
    closed    enough updates were accepted          (final)
    abandoned it could not be completed             (final)

With secure aggregation there are two phases before `open` and two behind it: see `fedge.secure_round`.

A deadline is about progress. A round that lacks its quorum when its time is over goes on as long as
somebody's work does, and without those whose work stands still: a slow client with a large model or a long
epoch needs no setting. `MAX_EXTENSIONS` bounds even a client that lies about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from fedge import secure_round
from fedge.cohort import Round, Step, Terms, given_up
from fedge.events import (
    Accept,
    Advertised,
    Arrived,
    Broken,
    Close,
    Consented,
    DeadlinePassed,
    Effect,
    Event,
    Failed,
    Joined,
    Left,
    OrderId,
    Phase,
    Progressed,
    Reject,
    Remind,
    Revealed,
    Send,
    Shared,
    StartTimer,
    Unmasked,
)
from fedge.refusal import Refusal, RefusalCode
from fedge.seeds import Numbers, derive_seed, mixed

MAX_EXTENSIONS: Final = 1000
"""How often a round may outlive its deadline, for progress of a thousandth of the work each."""


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
    if waiting.present >= terms.fewest:
        return _open(waiting)
    return waiting, (StartTimer(order, "waiting", terms.wait_s),)


def ranks(seed: int, order: OrderId, clients: tuple[str, ...]) -> Numbers:
    """Each client's place in the draw (uint64[clients]), which seed, order and its name alone decide, so that anybody
    can recompute it."""
    return mixed(_marks(clients), derive_seed(seed, "draw", order.kind, order.round, order.attempt))


@lru_cache(maxsize=4)
def _marks(clients: tuple[str, ...]) -> Numbers:
    """A number for each name; kept, since rounds draw from the same clients again and again."""
    return np.fromiter(map(_mark, clients), np.uint64, len(clients))


@lru_cache(maxsize=1 << 17)
def _mark(client: str) -> int:
    return int.from_bytes(hashlib.sha256(client.encode()).digest()[:8], "little")


def _ranked(round: Round) -> Round:
    """The same with its candidates in the order of the draw."""
    clients, turns = round.candidates, round.turns
    order = np.argsort(ranks(round.seed, round.order, clients), kind="stable")
    drawn = [clients[at] for at in order.tolist()]
    if turns:
        drawn.sort(key=lambda client: turns.get(client, 0))
    return replace(round, candidates=tuple(drawn))


def step(round: Round, event: Event) -> Step:
    """The table of transitions: (phase, event) -> what happens. Pairs not in it change nothing."""
    if isinstance(event, Joined | Left) or event.order == round.order:
        transition = _TABLE.get((round.phase, type(event)))
        return transition(round, event) if transition else (round, ())
    if isinstance(event, Arrived):  # for another round, or another attempt at this one
        return round, (Reject(event.client, event.order, _not_asked(event.order)),)
    return round, ()


def arrive(round: Round, clients: Sequence[str]) -> Step | None:
    """As `step` for the arrival of each of these in turn, but at once; None unless all of them are at work in an open
    round that wants as many, and nobody's part in it depends on anything else."""
    arrived = frozenset(clients)
    if (
        round.phase != "open"
        or round.terms.secure is not None
        or len(arrived) != len(clients)
        or not arrived <= round.pending
        or len(round.accepted) + len(arrived) > round.terms.size
    ):
        return None
    settled, effects = _settle(
        replace(round, pending=round.pending - arrived, accepted=round.accepted | arrived)
    )
    return settled, (*(Accept(client, round.order) for client in clients), *effects)


def resume(round: Round, kept: Collection[str], clients: Collection[str]) -> Step:
    """Go on with a round whose driver has started again; of the accepted, `kept` have their updates still.

    Everybody who was at work, and those of `clients` whose updates are lost, count as at work until `Left` says
    otherwise: so the cohort stays what it was. Clocks start anew.
    """
    if round.phase == "waiting":
        return round, (StartTimer(round.order, "waiting", round.terms.wait_s),)
    if round.terms.secure is not None and round.is_open:
        return secure_round.interrupted(round)
    if round.phase != "open":
        return round, ()
    gone = round.accepted - frozenset(kept)
    here = gone & frozenset(clients)
    round = replace(
        round,
        accepted=round.accepted - gone,
        pending=round.pending | here,
        lost=round.lost | (gone - here),
    )
    round, effects = _settle(round)
    timer = (StartTimer(round.order, "open", round.terms.deadline_s),) if round.phase == "open" else ()
    return round, (*effects, *timer)


def seal(round: Round) -> Round:
    """Ask nobody else from now on: the model that this round's orders carry is no longer the current one."""
    return replace(round, candidates=round.candidates[: round.cursor], away=frozenset())


def _open(round: Round) -> Step:
    secure = round.terms.secure
    round = replace(round, phase="open" if secure is None else "joining")
    seconds = round.terms.deadline_s if secure is None else secure.exchange_s
    round, sends = _ask(round)
    return round, (*sends, StartTimer(round.order, round.phase, seconds))


def _ask(round: Round) -> Step:
    """Ask candidates, best rank first, until as many are at work or done as the terms want."""
    if round.is_sealed:
        return round, ()
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
        reminder = (Remind(client, round.order),) if round.is_sealed else ()
        return back, (Send(client, round.order), *reminder)
    if round.is_sealed:
        return round, ()
    if client in round.away:
        round = replace(round, away=round.away - {client})
    elif client in round.candidates:
        return round, ()
    else:
        round = replace(round, candidates=(*round.candidates, client))
    if round.is_open:
        return _ask(round)
    if round.present < round.terms.fewest:
        return round, ()
    return _open(_ranked(round))


def _left(round: Round, event: Left) -> Step:
    client = event.client
    if client in round.pending:
        lost = replace(
            round,
            pending=round.pending - {client},
            lost=round.lost | {client},
            progress=round.progress_without(client),
            moving=round.moving - {client},
        )
        return _settle(lost)
    if client in round.stalled:
        return replace(round, stalled=round.stalled - {client}, progress=round.progress_without(client)), ()
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
        blamed=round.blamed | {(client, culprit) for culprit in event.culprits},
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
        progress=round.progress_without(client) | {(client, min(event.permille, 1000))},
        moving=round.moving | {client},
    )
    return moved, ()


def _settle(round: Round) -> Step:
    """After a change: replace who is lost, and close or give up if the outcome is known."""
    if round.phase == "joining":
        round, sends = _ask(round)
        return secure_round.settle_joining(round, sends)
    if round.phase == "sharing":
        return secure_round.settle_sharing(round)
    if round.phase != "open":
        return round, ()
    if round.is_sealed and not _are_enough(round, round.accepted | round.pending | round.lost):
        return secure_round.too_few(round, "are left", len(round.accepted | round.pending | round.lost))
    if len(round.accepted) >= round.terms.size and _are_enough(round, round.accepted):
        return _close(round)
    round, sends = _ask(round)
    if round.pending:
        return round, sends
    if _are_enough(round, round.accepted):
        return _close(round)
    if _are_enough(round, round.accepted | round.lost):
        return round, sends  # those who were cut off or stand still may go on before the deadline
    why = f"; the last one said: {round.last_refusal}" if round.last_refusal else ""
    reason = (
        f"{len(round.accepted)} of at least {round.terms.fewest} updates, "
        f"{len(round.failed)} clients failed and nobody else is here{why}"
    )
    return given_up(round, reason, culprits=secure_round.culprits(round))


def _are_enough(round: Round, clients: frozenset[str]) -> bool:
    """Whether these clients' updates make an aggregate."""
    if round.terms.secure is not None:
        return bool(secure_round.coming_through(round, clients))
    return len(clients) >= round.terms.quorum


def _close(round: Round) -> Step:
    if round.terms.secure is not None:
        return secure_round.ask_for_consent(round)
    effects: list[Effect] = [*round.cancels()]
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
    if _are_enough(round, round.accepted):
        return _close(round)
    if round.phase == "open" and round.pending & round.moving and round.extensions < MAX_EXTENSIONS:
        return _extend(round)
    if round.phase == "waiting":
        reason = f"{round.present} of at least {round.terms.fewest} clients after {round.terms.wait_s:g} s"
    else:
        reason = (
            f"{len(round.accepted)} of at least {round.terms.fewest} updates "
            f"after {round.terms.deadline_s:g} s"
        )
    return given_up(round, reason, culprits=secure_round.culprits(round))


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
    ("joining", Joined): _joined,
    ("joining", Left): _left,
    ("joining", Advertised): secure_round.advertised,
    ("joining", Arrived): secure_round.too_early,
    ("joining", Failed): _failed,
    ("joining", Progressed): _progressed,
    ("joining", DeadlinePassed): secure_round.joining_is_over,
    ("sharing", Joined): _joined,
    ("sharing", Left): _left,
    ("sharing", Shared): secure_round.shared,
    ("sharing", Arrived): secure_round.too_early,
    ("sharing", Failed): _failed,
    ("sharing", Progressed): _progressed,
    ("sharing", DeadlinePassed): secure_round.sharing_is_over,
    ("consenting", Joined): secure_round.returned,
    ("consenting", Arrived): _late,
    ("consenting", Failed): secure_round.failed,
    ("consenting", Consented): secure_round.consented,
    ("consenting", DeadlinePassed): secure_round.consenting_is_over,
    ("revealing", Joined): secure_round.returned,
    ("revealing", Arrived): _late,
    ("revealing", Failed): secure_round.failed,
    ("revealing", Consented): secure_round.consented,
    ("revealing", Revealed): secure_round.revealed,
    ("revealing", DeadlinePassed): secure_round.revealing_is_over,
    ("revealing", Unmasked): secure_round.unmasked,
    ("revealing", Broken): secure_round.broken,
    ("closed", Arrived): _late,
    ("abandoned", Arrived): _late,
}
