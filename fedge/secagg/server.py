"""The coordinator's side of a session: gathers what the members send, phase by phase, and takes the masks off the sum.

    Gathering.close -> Sharing.close -> Collecting.close -> Consenting.close -> Revealing.recover

Each value takes messages one by one (`take`, which checks them: what is wrong costs its sender its place) and is
closed when all are here, or when whoever drives it will wait no longer; `close` raises where too few are left.
Nothing that a site relies on depends on this side: it may do what it likes, and learns no more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedge.errors import BlamedError, RemoteProtocolError, RunError
from fedge.refusal import Refusal, RefusalCode
from fedge.secagg import decoding, shamir
from fedge.secagg.canonical import bitmap
from fedge.secagg.directory import Directory
from fedge.secagg.keys import SEED_BYTES, BadKeyError, BadSealError, KeyPair, derive, open_seal
from fedge.secagg.masks import KEY_BYTES
from fedge.secagg.session import (
    MAX_MEMBERS,
    Advertisement,
    Context,
    Envelope,
    InputProof,
    Reveal,
    Roster,
    Shares,
    commitment_of,
    consent_signed,
    encapsulates,
    input_signed,
    pair_label,
)
from fedge.secagg.site import recovery_key, self_mask_key, verified

_SEAL_BYTES = 2 * shamir.SHARE_BYTES + 16
_RECOVERY_BYTES = 32 + 16


@dataclass(frozen=True, slots=True, eq=False)
class Gathering:
    """P0: who wants to take part."""

    context: Context
    directory: Directory = field(repr=False)
    advertisements: Mapping[str, Advertisement] = field(default_factory=dict)

    def take(self, advertisement: Advertisement) -> Gathering:
        """Add a site's.

        Raises:
            RemoteProtocolError: it is for another session, or not signed by the site, or its keys are of no use to
                the others; or there is one.
        """
        site, context = advertisement.site, self.context
        if site in self.advertisements:
            raise RemoteProtocolError(f"expected one advertisement of {site}, found two")
        if len(self.advertisements) == MAX_MEMBERS:
            raise RemoteProtocolError(f"expected at most {MAX_MEMBERS} members of a session")
        if advertisement.context != context.digest:
            raise RemoteProtocolError("expected keys for this session, found some for another")
        if not verified(self.directory.key(site), advertisement.signature, advertisement.signed()):
            raise RemoteProtocolError(f"expected keys that {site} has signed with its identity")
        self._check_keys(advertisement)
        return replace(self, advertisements={**self.advertisements, site: advertisement})

    def _check_keys(self, advertisement: Advertisement) -> None:
        """One whose keys nobody can use would have every member refuse the roster."""
        anybody = KeyPair.of(bytes(SEED_BYTES), self.context.suite, "check")
        try:
            for public in (advertisement.channel, advertisement.mask):
                anybody.agree(public)
                anybody.encapsulate(public)
        except BadKeyError as error:
            raise RemoteProtocolError(f"the key of {advertisement.site}: {error}") from None
        everybody = (*self.advertisements.values(), advertisement)
        keys = [key for each in everybody for key in (each.channel, each.mask, each.commitment)]
        if len(set(keys)) != len(keys):
            raise RemoteProtocolError(f"expected keys of {advertisement.site} alone, each for one purpose")

    def only(self, sites: Collection[str]) -> Gathering:
        """Without those that are not wanted any more."""
        kept = {site: each for site, each in self.advertisements.items() if site in sites}
        return replace(self, advertisements=kept)

    def close(self) -> Sharing:
        """Nobody else takes part.

        Raises:
            RunError: they are too few, or too many.
        """
        if len(self.advertisements) < self.context.least:
            raise RunError(
                f"expected {self.context.least} members of a session or more, found {len(self.advertisements)}"
            )
        if len(self.advertisements) > self.context.most:
            raise RunError(
                f"expected {self.context.most} members of a session at most, found {len(self.advertisements)}"
            )
        roster = Roster.of(self.advertisements.values())
        return Sharing(self.context, self.directory, roster, roster.sid(self.context.digest))


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """P1: the roster is out."""

    context: Context
    directory: Directory = field(repr=False)
    roster: Roster
    sid: bytes
    shares: Mapping[int, Shares] = field(default_factory=dict)

    @property
    def needed(self) -> int:
        return self.context.needed(len(self.roster))

    def take(self, number: int, shares: Shares) -> Sharing:
        """Add a member's.

        Raises:
            RemoteProtocolError: they are not for every other member, or of the wrong size; or there are some.
        """
        suite, others = self.context.suite, set(self.roster.numbers) - {number}
        if number in self.shares:
            raise RemoteProtocolError(f"expected one message of shares of member {number}, found two")
        if set(shares.envelopes) != others:
            raise RemoteProtocolError("expected shares for every other member of the session")
        chosen = {other for other in others if suite.has_kem and encapsulates(number, other)}
        if set(shares.recovery) != chosen or any(
            len(each) != _RECOVERY_BYTES for each in shares.recovery.values()
        ):
            raise RemoteProtocolError("expected what it takes to recover each secret that was sent")
        for other, envelope in shares.envelopes.items():
            pair = suite.ciphertext_bytes if encapsulates(number, other) else 0
            found = (len(envelope.sealed), len(envelope.channel), len(envelope.mask))
            if found != (_SEAL_BYTES, suite.ciphertext_bytes, pair):
                raise RemoteProtocolError(f"expected an envelope of {_SEAL_BYTES} bytes, found {found}")
        return replace(self, shares={**self.shares, number: shares})

    def close(self) -> Collecting:
        """Those who have shared mask with each other; the others are out.

        Raises:
            RunError: too few have.
        """
        _check_enough("have shared their seeds", len(self.shares), self.needed)
        return Collecting(self.context, self.directory, self.roster, self.sid, self.shares)


@dataclass(frozen=True, slots=True, eq=False)
class Collecting:
    """P2: the envelopes are out. The masked vectors themselves go to whoever sums them."""

    context: Context
    directory: Directory = field(repr=False)
    roster: Roster
    sid: bytes
    shares: Mapping[int, Shares] = field(repr=False)
    arrived: frozenset[int] = frozenset()

    @property
    def needed(self) -> int:
        return self.context.needed(len(self.roster))

    def envelopes(self, number: int) -> dict[int, Envelope]:
        """What the others have sealed for a member."""
        return {other: shares.envelopes[number] for other, shares in self.shares.items() if other != number}

    def take(self, number: int, proof: InputProof) -> Collecting:
        """A member's masked vector, of this digest, is in the sum.

        Raises:
            RemoteProtocolError: it has not shared its seeds, or not signed this vector; or there is one.
        """
        if number not in self.shares or number in self.arrived:
            raise RemoteProtocolError(f"expected one input of each member that shared, found one of {number}")
        key = self.directory.key(self.roster.member(number).site)
        if not verified(key, proof.signature, input_signed(self.sid, number, proof.digest)):
            raise RemoteProtocolError(f"expected an input that member {number} has signed with its identity")
        return replace(self, arrived=self.arrived | {number})

    def close(self) -> Consenting:
        """No other input counts.

        Raises:
            RunError: too few have arrived.
        """
        needed = max(self.needed, self.context.least)
        _check_enough("have handed in their input", len(self.arrived), needed)
        return Consenting(self.context, self.directory, self.roster, self.sid, self.shares, self.arrived)


@dataclass(frozen=True, slots=True, eq=False)
class Consenting:
    """P3: the survivors are out."""

    context: Context
    directory: Directory = field(repr=False)
    roster: Roster
    sid: bytes
    shares: Mapping[int, Shares] = field(repr=False)
    survivors: frozenset[int]
    consents: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def bitmap(self) -> bytes:
        """The survivors, a bit for each of the roster."""
        return bitmap([number in self.survivors for number in self.roster.numbers])

    def take(self, number: int, signature: bytes) -> Consenting:
        """Add a survivor's consent.

        Raises:
            RemoteProtocolError: it is no survivor, or its signature is over something else.
        """
        key = self.directory.key(self.roster.member(number).site)
        signed = consent_signed(self.sid, number, self.roster, self.survivors)
        if number not in self.survivors or not verified(key, signature, signed):
            raise RemoteProtocolError(f"expected a survivor's consent, found something else from {number}")
        return replace(self, consents={**self.consents, number: signature})

    def close(self) -> Revealing:
        """Enough have consented: each of them, and whoever does so yet, may be asked to reveal.

        Raises:
            RunError: too few have.
        """
        if self.context.consistency:
            _check_enough("have consented", len(self.consents), self.context.needed(len(self.roster)))
        return Revealing(self.context, self.roster, self.sid, self.shares, self.survivors)


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """What is left on the sum of the survivors' inputs: keys whose masks are to be subtracted, and to be added."""

    subtract: tuple[bytes, ...] = field(repr=False)
    add: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Revealing:
    """P4: the consents are out."""

    context: Context
    roster: Roster
    sid: bytes
    shares: Mapping[int, Shares] = field(repr=False)
    survivors: frozenset[int]
    revealed: Mapping[int, Reveal] = field(default_factory=dict, repr=False)

    @property
    def needed(self) -> int:
        return self.context.needed(len(self.roster))

    def take(self, number: int, reveal: Reveal) -> Revealing:
        """Add what a survivor reveals.

        Raises:
            RemoteProtocolError: it is no survivor, or did so before, or these are no shares.
        """
        if number not in self.survivors or number in self.revealed:
            raise RemoteProtocolError(f"expected one reveal of each survivor, found one of {number}")
        shape = (len(self.shares), shamir.LIMBS)
        if reveal.shares.shape != shape or (reveal.shares.astype(np.uint64) >= shamir.PRIME).any():
            raise RemoteProtocolError(f"expected {shape} elements of the field, found others")
        return replace(self, revealed={**self.revealed, number: reveal})

    def recover(self) -> Recovered:
        """Rebuild what the masks are made of, from any shares that are right.

        Raises:
            RunError: too few have revealed.
            BlamedError: SHARES_INVALID; the seeds of some cannot be rebuilt, since their shares are too often wrong.
        """
        _check_enough("have revealed their shares", len(self.revealed), self.needed)
        sharers = sorted(self.shares)
        points = sorted(self.revealed)
        held = np.stack([self.revealed[point].shares for point in points])
        seeds, culprits = decoding.rebuild(
            points,
            held,
            threshold=self.needed,
            right=[self._right(number) for number in sharers],
        )
        if culprits:
            names = [self.roster.member(sharers[at]).site for at in culprits]
            raise BlamedError(
                Refusal(RefusalCode.SHARES_INVALID, f"the seeds of {', '.join(names[:5])} cannot be rebuilt"),
                names,
            )
        subtract: list[bytes] = []
        add: list[bytes] = []
        for number, seed in zip(sharers, seeds, strict=True):
            if number in self.survivors:
                subtract.append(self_mask_key(seed, self.sid))
            else:
                more = self._left_by(number, seed)
                subtract += more.subtract
                add += more.add
        return Recovered(tuple(subtract), tuple(add))

    def _right(self, number: int) -> decoding.Right:
        """Whether a seed is the one that a member has committed to, or published the key of."""
        member, suite = self.roster.member(number), self.context.suite
        if number in self.survivors:
            return lambda seed: commitment_of(seed) == member.commitment
        return lambda seed: KeyPair.of(seed, suite, "mask").public == member.mask

    def _left_by(self, number: int, seed: bytes) -> Recovered:
        """The masks between one that dropped out, of this seed, and the survivors."""
        pair = KeyPair.of(seed, self.context.suite, "mask")
        subtract: list[bytes] = []
        add: list[bytes] = []
        for other in sorted(self.survivors):
            try:
                secret = pair.agree(self.roster.member(other).mask) + self._encapsulated(
                    number, other, pair, seed
                )
            except BadSealError as error:
                site = self.roster.member(number).site
                refusal = Refusal(
                    RefusalCode.SHARES_INVALID, f"the masks of {site} cannot be recovered: {error}"
                )
                raise BlamedError(refusal, [site]) from None
            key = derive(secret, KEY_BYTES, *pair_label(self.sid, number, other), salt=self.sid)
            # The survivor has added the masks with those above it, and subtracted those below.
            (subtract if number > other else add).append(key)
        return Recovered(tuple(subtract), tuple(add))

    def _encapsulated(self, number: int, other: int, pair: KeyPair, seed: bytes) -> bytes:
        """The KEM's part of the secret of a pair, of which `number` has dropped out."""
        if not self.context.suite.has_kem:
            return b""
        if encapsulates(other, number):
            return pair.decapsulate(self.shares[other].envelopes[number].mask)
        sealed = self.shares[number].recovery[other]
        return open_seal(recovery_key(seed, self.sid, other), sealed, self.sid, other)


def _check_enough(did: str, found: int, needed: int) -> None:
    if found < needed:
        raise RunError(f"{found} of at least {needed} members of the session {did}")
