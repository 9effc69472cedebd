"""The phases that secure aggregation adds to a round: keys and shares before the updates, two exchanges behind them.

    joining     the cohort shows its keys        then nobody else can be asked: the roster is fixed
    sharing     its members share their seeds    then those who have know with whom they mask
    open        as without secure aggregation    then the survivors are those whose updates are in
    consenting  they consent to who survived     then whoever has may be asked to reveal
    revealing   they reveal shares               then the masks come off the sum, and the round is closed

The work goes on in the first three. Members of several shards sum apart: a shard that is left with too few is left
out, and the round goes on with the others. What is revealed is revealed: a round that is given up in the last phase
is spent, and nobody makes another attempt at it. The messages themselves are the driver's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from fedge.cohort import Round, SecureTerms, Step, given_up
from fedge.events import (
    Advertised,
    Arrived,
    Broken,
    Cancel,
    Close,
    Consented,
    DeadlinePassed,
    Disclose,
    Effect,
    Enlist,
    Failed,
    Joined,
    Mask,
    Reject,
    Remind,
    Revealed,
    Shared,
    StartTimer,
    Survive,
    Unmask,
    Unmasked,
)
from fedge.refusal import Refusal, RefusalCode


def coming_through(round: Round, clients: Collection[str]) -> frozenset[str]:
    """Those of `clients` in whose shard enough of them are; nobody if they are fewer than the quorum."""
    return _with_quorum(round, _in_whole_shards(round, frozenset(clients)))


def culprits(round: Round) -> tuple[str, ...]:
    """Who is left out of the next attempt: whom the coordinator or two others blame, and of two of whom one blames
    the other both, since nobody can tell which of them lies."""
    times = Counter(culprit for _, culprit in round.blamed)
    sure = {culprit for accuser, culprit in round.blamed if not accuser or times[culprit] > 1}
    unsure = {each for pair in round.blamed if pair[1] not in sure for each in pair}
    return tuple(sorted(sure | unsure))


def too_few(round: Round, did: str, found: int, *, spent: bool = False) -> Step:
    """Give up: only `found` members have done what was to be done."""
    members = len(round.enlisted)
    why = f"; the last one said: {round.last_refusal}" if round.last_refusal else ""
    reason = f"{found} of {members} members of the secure sum {did}, which are too few{why}"
    return given_up(round, reason, culprits=culprits(round), spent=spent)


def interrupted(round: Round) -> Step:
    """Its driver has started again, and the coordinator's part of the session is gone."""
    return given_up(round, "the coordinator was started again", spent=round.phase == "revealing")


# joining


def advertised(round: Round, event: Advertised) -> Step:
    if event.client not in round.pending or event.client in dict(round.enlisted):
        return round, ()
    return settle_joining(replace(round, enlisted=round.enlisted | {(event.client, event.shard)}))


def settle_joining(round: Round, sends: tuple[Effect, ...] = ()) -> Step:
    """After a change: fix the roster once everybody at work has shown keys and they are enough."""
    if round.pending:
        everybody = round.pending <= dict(round.enlisted).keys()
        if everybody and len(round.pending) >= round.terms.fewest:
            return _seal(round, sends)
        return round, sends
    if len(round.lost) >= round.terms.fewest:
        return round, sends
    why = f"; the last one said: {round.last_refusal}" if round.last_refusal else ""
    reason = f"{len(round.failed)} clients failed and nobody else is here{why}"
    return given_up(round, reason, culprits=culprits(round))


def joining_is_over(round: Round, event: DeadlinePassed) -> Step:
    if event.phase != round.phase:
        return round, ()
    return _seal(round)


def too_early(round: Round, event: Arrived) -> Step:
    refusal = Refusal(
        RefusalCode.NOT_ASKED, f"the members of the {round.order} have not shared their seeds yet"
    )
    return round, (Reject(event.client, event.order, refusal),)


def _seal(round: Round, sends: tuple[Effect, ...] = ()) -> Step:
    terms = _terms(round)
    members = frozenset((client, shard) for client, shard in round.enlisted if client in round.pending)
    shown, sizes = len(members), Counter(shard for _, shard in members)
    members = frozenset(pair for pair in members if sizes[pair[1]] >= terms.least)
    # More than were asked for are here when somebody is back who was replaced: sums are made for no more than those.
    names = frozenset(sorted(dict(members))[: round.terms.asked])
    members = frozenset(pair for pair in members if pair[0] in names)
    if len(names) < round.terms.fewest:
        reason = f"{shown} of at least {round.terms.fewest} clients have shown keys"
        if shown >= round.terms.fewest:
            reason += f", which are too few in some shards: {terms.least} are needed in each"
        return given_up(round, reason)
    out = round.pending - names
    sealed = replace(
        round,
        phase="sharing",
        pending=names,
        lost=frozenset(),
        stalled=frozenset(),
        failed=round.failed | out | round.lost,
        enlisted=members,
        candidates=round.candidates[: round.cursor],
        away=frozenset(),
    )
    return sealed, (
        *sends,
        *_cancel(round, out),
        Enlist(round.order, tuple(sorted(names))),
        StartTimer(round.order, "sharing", terms.exchange_s),
    )


# sharing


def shared(round: Round, event: Shared) -> Step:
    if event.client not in round.pending | round.lost:
        return round, ()
    return settle_sharing(replace(round, shared=round.shared | {event.client}))


def settle_sharing(round: Round) -> Step:
    """After a change: go on once everybody with a link has shared, if they are enough."""
    if not coming_through(round, round.pending | round.lost):
        return too_few(round, "are left", len(round.pending | round.lost))
    if round.pending <= round.shared and coming_through(round, round.shared):
        return _mask(round)
    return round, ()


def sharing_is_over(round: Round, event: DeadlinePassed) -> Step:
    if event.phase != round.phase:
        return round, ()
    if coming_through(round, round.shared):
        return _mask(round)
    return too_few(round, "have shared their seeds", len(round.shared))


def _mask(round: Round) -> Step:
    members = coming_through(round, round.shared)
    out = (round.pending | round.lost) - members
    masking = replace(
        round,
        phase="open",
        pending=round.pending & members,
        lost=round.lost & members,
        stalled=round.stalled & members,
        failed=round.failed | out,
        moving=frozenset(),
    )
    return masking, (
        *_cancel(round, out),
        Mask(round.order, tuple(sorted(members))),
        StartTimer(round.order, "open", round.terms.deadline_s),
    )


# consenting


def ask_for_consent(round: Round) -> Step:
    """Enough updates are in; no other one counts."""
    survivors, terms = coming_through(round, round.accepted), _terms(round)
    asked = replace(
        round,
        phase="consenting",
        pending=frozenset(),
        lost=round.lost | round.pending,
        stalled=frozenset(),
        survivors=survivors,
    )
    effects = (*round.cancels(), Survive(round.order, tuple(sorted(survivors))))
    if terms.consistency:
        return asked, (*effects, StartTimer(round.order, "consenting", terms.exchange_s))
    asked, more = _reveal(replace(asked, consented=survivors))
    return asked, (*effects, *more)


def consented(round: Round, event: Consented) -> Step:
    if event.client not in round.survivors - round.consented:
        return round, ()
    round = replace(round, consented=round.consented | {event.client})
    if round.phase == "revealing":
        return round, (Disclose(round.order, (event.client,)),)
    if _each_shard_has(round, round.consented):
        return _reveal(round)
    return round, ()


def consenting_is_over(round: Round, event: DeadlinePassed) -> Step:
    if event.phase != round.phase:
        return round, ()
    kept = _with_quorum(round, _survivors_of_shards_with(round, round.consented))
    if not kept:
        return too_few(round, "have consented", len(round.consented))
    return _reveal(replace(round, survivors=kept, consented=round.consented & kept))


def _reveal(round: Round) -> Step:
    return replace(round, phase="revealing"), (
        Disclose(round.order, tuple(sorted(round.consented))),
        StartTimer(round.order, "revealing", _terms(round).exchange_s),
    )


# revealing


def revealed(round: Round, event: Revealed) -> Step:
    if event.client not in round.survivors - round.revealed:
        return round, ()
    round = replace(round, revealed=round.revealed | {event.client})
    if round.unmasking or not _each_shard_has(round, round.revealed):
        return round, ()
    return _unmask(round)


def revealing_is_over(round: Round, event: DeadlinePassed) -> Step:
    if event.phase != round.phase:
        return round, ()
    if round.unmasking:
        return replace(round, failed=round.failed | (round.survivors - round.revealed)), ()
    kept = _with_quorum(round, _survivors_of_shards_with(round, round.revealed))
    if not kept or round.blamed:
        return too_few(round, "have revealed their shares", len(round.revealed), spent=True)
    silent = kept - round.revealed  # nobody waits for them any more
    return _unmask(replace(round, survivors=kept, failed=round.failed | silent))


def unmasked(round: Round, event: Unmasked) -> Step:
    closed = replace(round, phase="closed", accepted=round.survivors)
    return closed, (Close(round.order, tuple(sorted(round.survivors))),)


def broken(round: Round, event: Broken) -> Step:
    blamed = round.blamed | {("", culprit) for culprit in event.culprits}
    round = replace(round, unmasking=False, blamed=blamed)
    if not event.final and round.survivors - round.revealed - round.failed:
        return round, ()  # with other shares it may do
    return given_up(round, event.reason, culprits=culprits(round), spent=True)


def _unmask(round: Round) -> Step:
    return replace(round, unmasking=True), (Unmask(round.order, tuple(sorted(round.survivors))),)


# consenting and revealing


def failed(round: Round, event: Failed) -> Step:
    """A survivor cannot go on; its input stays in the sum."""
    if event.client not in round.survivors - round.failed:
        return round, ()
    round = replace(round, failed=round.failed | {event.client}, last_refusal=event.refusal)
    done = round.consented if round.phase == "consenting" else round.revealed
    if round.unmasking or _survivors_of_shards_with(round, (round.survivors - round.failed) | done):
        return round, ()
    spent = round.phase == "revealing"
    return too_few(round, "can go on", len(round.survivors - round.failed), spent=spent)


def returned(round: Round, event: Joined) -> Step:
    """A survivor's link is back."""
    return round, ((Remind(event.client, round.order),) if event.client in round.survivors else ())


def _terms(round: Round) -> SecureTerms:
    assert round.terms.secure is not None  # only such rounds come here
    return round.terms.secure


def _shards(round: Round) -> list[frozenset[str]]:
    shards: dict[int, set[str]] = {}
    for client, shard in round.enlisted:
        shards.setdefault(shard, set()).add(client)
    return [frozenset(members) for _, members in sorted(shards.items())]


def _in_whole_shards(round: Round, clients: frozenset[str]) -> frozenset[str]:
    """Those of `clients` in whose shard enough of them are."""
    terms = _terms(round)
    return frozenset().union(
        *(
            each & clients
            for each in _shards(round)
            if len(each & clients) >= max(terms.needed(len(each)), terms.least)
        )
    )


def _survivors_of_shards_with(round: Round, clients: frozenset[str]) -> frozenset[str]:
    """The survivors in whose shard enough of `clients` are."""
    terms = _terms(round)
    return frozenset().union(
        *(
            each & round.survivors
            for each in _shards(round)
            if len(each & round.survivors & clients) >= terms.needed(len(each))
        )
    )


def _each_shard_has(round: Round, clients: frozenset[str]) -> bool:
    """Whether enough of `clients` are in every shard that has survivors."""
    return _survivors_of_shards_with(round, clients) == round.survivors


def _with_quorum(round: Round, clients: frozenset[str]) -> frozenset[str]:
    return clients if len(clients) >= round.terms.quorum else frozenset()


def _cancel(round: Round, clients: frozenset[str]) -> tuple[Effect, ...]:
    return tuple(Cancel(client, round.order) for client in sorted(clients & frozenset(round.at_work)))
