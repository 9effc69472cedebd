"""One session of secure aggregation: what it is about, who takes part, and the messages of its five phases.

    P0  advertise   site -> coordinator   Advertisement
        roster      coordinator -> sites  Roster
    P1  share       site -> coordinator   Shares
        envelopes   coordinator -> sites  those for each
    P2  input       site -> coordinator   a masked vector, and its InputProof
    P3  survivors   coordinator -> sites  whose inputs have arrived
        consent     site -> coordinator   a signature over them
    P4  consents    coordinator -> sites  enough of these
        reveal      site -> coordinator   one share of one secret of each member

Values; who checks what is in `site` and `server`. Members are numbered from 1 in the order of the roster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fedge.events import OrderId
from fedge.secagg.canonical import bitmap, digest, layout
from fedge.secagg.keys import Suite
from fedge.secagg.shamir import Shares as ShareArray

MAX_MEMBERS: Final = 256
"""The graph is complete: more sites than these are divided (see `shards`)."""

MIN_MEMBERS: Final = 3
"""Of a sum of two, each of them knows the other's part."""

MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Context:
    """What a session is about; every member must mean the same.

    `vectors` says how numbers are encoded, `privacy` which noise is inside, `offer` what was agreed for the run; all
    three and the model are digests. `least` is the fewest whose sum it may be and `most` the most who may take part,
    `threshold_ppm` how many of a million members must come to the end; `epoch` that of the directory with their keys.
    `shard` of `shards` sums apart.
    """

    federation: str
    run_id: str
    order: OrderId
    suite: Suite
    vectors: bytes
    privacy: bytes
    offer: bytes
    model: bytes
    least: int
    most: int
    threshold_ppm: int
    epoch: int
    consistency: bool = True
    shard: int = 0
    shards: int = 1

    @property
    def digest(self) -> bytes:
        """ctx: 32 bytes."""
        return digest(
            "context",
            *(self.federation, self.run_id, self.order.kind, self.order.round, self.order.attempt),
            *(int(self.suite), self.vectors, self.privacy, self.offer, self.model),
            *(
                self.least,
                self.most,
                self.threshold_ppm,
                self.epoch,
                int(self.consistency),
                self.shard,
                self.shards,
            ),
        )

    def needed(self, members: int) -> int:
        """How many of so many members must come to the end."""
        return needed(members, self.threshold_ppm)


def needed(members: int, threshold_ppm: int = 0) -> int:
    """How many of so many members must come to the end: more than two thirds, or so many of a million.

    Two quorums of that size have more members in common than may be corrupt, so no honest one is ever asked for both
    kinds of share.
    """
    return max(2 * members // 3 + 1, -(-members * threshold_ppm // MILLION))


@dataclass(frozen=True, slots=True)
class Advertisement:
    """P0: a member's public keys and its commitment to its self mask, signed with its identity."""

    site: str
    context: bytes
    channel: bytes
    mask: bytes
    commitment: bytes
    signature: bytes = b""

    def signed(self) -> bytes:
        """What the signature is over."""
        return layout("advertise", self.context, self.site, self.channel, self.mask, self.commitment)


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes part in a session, by name."""

    members: tuple[Advertisement, ...]

    @classmethod
    def of(cls, advertisements: Iterable[Advertisement]) -> Roster:
        return cls(tuple(sorted(advertisements, key=lambda each: each.site)))

    def __len__(self) -> int:
        return len(self.members)

    def member(self, number: int) -> Advertisement:
        """By its number, from 1."""
        return self.members[number - 1]

    def number(self, site: str) -> int | None:
        """A site's number, from 1; None if it takes no part."""
        return next((at for at, member in enumerate(self.members, 1) if member.site == site), None)

    @property
    def numbers(self) -> range:
        return range(1, len(self.members) + 1)

    def sid(self, context: bytes) -> bytes:
        """The session's name, which is in every key: 32 bytes."""
        everybody = digest(
            "roster", *(part for each in self.members for part in (each.signed(), each.signature))
        )
        return digest("session", context, everybody)


@dataclass(frozen=True, slots=True)
class Envelope:
    """P1: one member's shares for another, sealed. `channel` and `mask` are ciphertexts of suite 2's KEM, for the
    key of this envelope and for the pair's mask; of a pair, one member alone sends the latter: see `encapsulates`."""

    sealed: bytes
    channel: bytes = b""
    mask: bytes = b""


@dataclass(frozen=True, slots=True)
class Shares:
    """P1: an envelope for each other member, by number. `recovery` (suite 2) has for each whose mask's secret this
    member has encapsulated that secret, sealed under a key that follows from the mask key's seed."""

    envelopes: Mapping[int, Envelope]
    recovery: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class InputProof:
    """P2: which masked vector is a member's, signed."""

    digest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Reveal:
    """P4: for each member that shared, in the order of their numbers, this member's share of one of its secrets:
    of its self mask's seed if it survived, else of its mask key's. uint32[sharers, LIMBS]. There is room for one."""

    shares: ShareArray


def encapsulates(member: int, other: int) -> bool:
    """Whether of a pair it is this member that encapsulates the secret of their mask (suite 2). Neighbours in number
    take turns, so that everybody does so for half of the others."""
    return (member < other) == ((member + other) % 2 == 1)


def input_signed(sid: bytes, number: int, vector: bytes) -> bytes:
    """What an InputProof's signature is over; `vector` is the digest."""
    return layout("input", sid, number, vector)


def consent_signed(sid: bytes, number: int, roster: Roster, survivors: frozenset[int]) -> bytes:
    """What a consent's signature is over."""
    return layout("consent", sid, number, bitmap([each in survivors for each in roster.numbers]))


def commitment_of(seed: bytes) -> bytes:
    """A commitment to a self mask's seed; the seed is uniform, so that nothing else is needed to hide it."""
    return digest("commitment", seed)


def pair_label(sid: bytes, one: int, other: int) -> tuple[bytes, str, int, int]:
    """Under which label two members' mask key is derived."""
    return sid, "pair", min(one, other), max(one, other)
