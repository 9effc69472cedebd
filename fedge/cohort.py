"""Who takes part in a round, and on what terms: the state that the tables of `fedge.round` and
`fedge.secure_round` go by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedge.events import Cancel, Effect, GiveUp, OrderId, Phase
from fedge.refusal import Refusal
from fedge.secagg.session import needed


@dataclass(frozen=True, slots=True)
class SecureTerms:
    """Of secure aggregation: each sum is of `least` or more, and so many of a million members must come to the end.

    Each exchange of messages is given `exchange_s`. Without `consistency` the members do not compare who survived.
    """

    least: int
    threshold_ppm: int = 0
    consistency: bool = True
    exchange_s: float = 60.0

    def needed(self, members: int) -> int:
        return needed(members, self.threshold_ppm)


@dataclass(frozen=True, slots=True)
class Terms:
    """How many are asked, how many are enough, how long they have.

    `ceil(size * over_select)` clients are asked. The round closes when `size` updates are in, or when
    nobody is left to wait for or the deadline passes with at least `quorum`. With fewer, it goes on at the
    deadline if one of those at work has made progress since the last one.

    With `secure`, who is asked is fixed once all of them have shown keys, and the round ends with two exchanges
    behind the last update.
    """

    size: int
    quorum: int
    over_select: float = 1.0
    deadline_s: float = 600.0
    wait_s: float = 3600.0
    secure: SecureTerms | None = None

    @property
    def fewest(self) -> int:
        """Clients without which a round need not begin."""
        return self.quorum if self.secure is None else max(self.quorum, self.secure.least)

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

    Of secure aggregation: `enlisted` have shown keys, each for its shard; `shared` their seeds; `survivors` are those
    whose sum is wanted, and `consented` and `revealed` those of them that have. `blamed` is who says whose messages
    make it impossible (the coordinator itself: ""); `unmasking` that the masks are being taken off.
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
    enlisted: frozenset[tuple[str, int]] = frozenset()
    shared: frozenset[str] = frozenset()
    survivors: frozenset[str] = frozenset()
    consented: frozenset[str] = frozenset()
    revealed: frozenset[str] = frozenset()
    blamed: frozenset[tuple[str, str]] = frozenset()
    unmasking: bool = False

    @property
    def present(self) -> int:
        """Clients that are here and could be asked."""
        return len(self.candidates) - self.cursor - len(self.away)

    @property
    def at_work(self) -> list[str]:
        """Those who have the order and a link, by name."""
        return sorted(self.pending | self.stalled)

    @property
    def is_open(self) -> bool:
        """Whether a cohort has its orders."""
        return self.phase not in ("waiting", "closed", "abandoned")

    @property
    def is_sealed(self) -> bool:
        """Whether nobody else can be asked."""
        return self.terms.secure is not None and self.phase not in ("waiting", "joining")

    def cancels(self) -> tuple[Effect, ...]:
        """What tells everybody at work that it is over."""
        return tuple(Cancel(client, self.order) for client in self.at_work)

    def progress_without(self, *clients: str) -> frozenset[tuple[str, int]]:
        """The progress of the others."""
        return frozenset(pair for pair in self.progress if pair[0] not in clients)

    @property
    def cohort(self) -> dict[str, str]:
        """Who was asked, and what became of it."""
        groups = (("pending", self.pending), ("accepted", self.accepted), ("lost", self.lost))
        return {
            client: name for name, group in (*groups, ("failed", self.failed)) for client in sorted(group)
        }


Step = tuple[Round, tuple[Effect, ...]]


def given_up(round: Round, reason: str, *, culprits: tuple[str, ...] = (), spent: bool = False) -> Step:
    """The round is abandoned; whoever is at work is told."""
    give_up = GiveUp(round.order, reason, culprits, spent)
    return replace(round, phase="abandoned"), (*round.cancels(), give_up)
