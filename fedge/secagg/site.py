"""The site's side of a session: five steps, each a value that knows only what it needs for the next.

    advertise -> Advertised.share -> Shared.open -> Opened.mask -> Masked.consent -> Consented.reveal

Every check that protects this site against a coordinator that lies is here, and raises a typed refusal. No I/O:
randomness is an argument, keys are found in a directory that the caller has verified. A value's step is to be made
once: the caller keeps the newest value and forgets the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.errors import BlamedError, RefusedError
from fedge.privacy.secure import SecureSource
from fedge.refusal import Refusal, RefusalCode
from fedge.secagg import shamir
from fedge.secagg.directory import Directory
from fedge.secagg.keys import SEED_BYTES, BadKeyError, BadSealError, KeyPair, derive, open_seal, seal
from fedge.secagg.masks import KEY_BYTES, apply_masks, blocks_of
from fedge.secagg.ring import Words
from fedge.secagg.session import (
    MIN_MEMBERS,
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
from fedge.secagg.shards import shard_of

Entropy = Callable[[int], bytes]
"""So many bytes from a cryptographic source."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a site's owner insists on, whatever the coordinator says."""

    least: int = MIN_MEMBERS
    honest_coordinator: bool = False


@dataclass(frozen=True, slots=True)
class _Secrets:
    """Of one session: the seeds of the mask key and of the self mask, and the two key pairs."""

    mask_seed: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    channel: KeyPair
    mask: KeyPair


def advertise(
    context: Context, site: str, signer: Ed25519PrivateKey, rules: Rules, entropy: Entropy
) -> tuple[Advertised, Advertisement]:
    """P0: fresh keys for a session.

    Raises:
        RefusedError: PROTECTION_TOO_WEAK; the session's terms are not as the owner's rules want them.
    """
    least = max(rules.least, MIN_MEMBERS)
    if context.least < least:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            f"asked for sums of {context.least} sites or more; this site wants {least} or more",
        )
    if not context.consistency and not rules.honest_coordinator:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            "asked for secure aggregation that only an honest coordinator cannot break; this site's [policy] does "
            "not set honest_coordinator = true",
        )
    mask_seed, self_seed, channel_seed = (entropy(SEED_BYTES) for _ in range(3))
    secrets = _Secrets(
        mask_seed,
        self_seed,
        KeyPair.of(channel_seed, context.suite, "channel"),
        KeyPair.of(mask_seed, context.suite, "mask"),
    )
    unsigned = Advertisement(
        site, context.digest, secrets.channel.public, secrets.mask.public, commitment_of(self_seed)
    )
    own = Advertisement(
        site,
        unsigned.context,
        unsigned.channel,
        unsigned.mask,
        unsigned.commitment,
        signer.sign(unsigned.signed()),
    )
    return Advertised(context, own, secrets, signer), own


@dataclass(frozen=True, slots=True)
class Advertised:
    """After P0: waiting for the roster."""

    context: Context
    own: Advertisement
    _secrets: _Secrets = field(repr=False)
    _signer: Ed25519PrivateKey = field(repr=False)

    def share(self, roster: Roster, directory: Directory, entropy: Entropy) -> tuple[Shared, Shares]:
        """P1: shares of this site's two seeds, for everybody in the roster.

        Raises:
            RefusedError: ROSTER_INVALID or CONTEXT_DIFFERS; this is not a roster in which the others' keys are
                theirs and all mean the same session.
        """
        _check_roster(self.context, self.own, roster, directory)
        number = roster.number(self.own.site)
        assert number is not None  # checked
        count = len(roster)
        sid = roster.sid(self.context.digest)
        secrets = self._secrets
        shares = shamir.split(
            [secrets.mask_seed, secrets.self_seed],
            shares=count,
            threshold=self.context.needed(count),
            source=SecureSource(entropy(SEED_BYTES)),
        )
        envelopes, recovery, pairs = {}, {}, {}
        for other in roster.numbers:
            if other == number:
                continue
            peer = roster.member(other)
            try:
                channel_secret, channel_cipher = secrets.channel.encapsulate(peer.channel)
                key = _channel_key(secrets.channel.agree(peer.channel) + channel_secret, sid, number, other)
                pair_secret, pair_cipher = b"", b""
                if encapsulates(number, other):
                    pair_secret, pair_cipher = secrets.mask.encapsulate(peer.mask)
                    if pair_secret:
                        recovery[other] = _seal_recovery(secrets.mask_seed, sid, other, pair_secret)
                pairs[other] = secrets.mask.agree(peer.mask) + pair_secret
            except BadKeyError as error:
                raise _bad_roster(f"the key of {peer.site}: {error}") from None
            sealed = seal(key, shares[other - 1].tobytes(), sid, number, other, channel_cipher, pair_cipher)
            envelopes[other] = Envelope(sealed, channel_cipher, pair_cipher)
        state = Shared(
            self.context,
            roster,
            sid,
            number,
            directory,
            secrets,
            self._signer,
            pairs,
            shares[number - 1].copy(),
        )
        return state, Shares(envelopes, recovery)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """After P1: waiting for the envelopes of those who shared, too."""

    context: Context
    roster: Roster
    sid: bytes
    number: int
    _directory: Directory = field(repr=False)
    _secrets: _Secrets = field(repr=False)
    _signer: Ed25519PrivateKey = field(repr=False)
    _pairs: Mapping[int, bytes] = field(repr=False)
    _own_shares: shamir.Shares = field(repr=False)

    @property
    def needed(self) -> int:
        return self.context.needed(len(self.roster))

    def open(self, envelopes: Mapping[int, Envelope]) -> Opened:
        """P2, first half: the shares that others have given this site. From now on it is known who masks with whom.

        Raises:
            BlamedError: SHARES_INVALID; some envelopes cannot be opened, and whose they are.
            RefusedError: ROSTER_INVALID; they are of too few members, or of others.
        """
        others = set(envelopes)
        if not others <= set(self.roster.numbers) - {self.number}:
            raise _bad_roster("shares of somebody who is not in it")
        if len(others) + 1 < self.needed:
            raise _bad_roster(f"shares of {len(others) + 1} members, where {self.needed} are needed")
        held, masks, culprits = {self.number: self._own_shares}, {}, []
        for other, envelope in envelopes.items():
            try:
                held[other] = self._opened(other, envelope)
                pair = self._pairs[other]
                if encapsulates(other, self.number):
                    pair += self._secrets.mask.decapsulate(envelope.mask)
            except BadSealError:
                culprits.append(self.roster.member(other).site)
                continue
            masks[other] = derive(pair, KEY_BYTES, *pair_label(self.sid, self.number, other), salt=self.sid)
        if culprits:
            refusal = Refusal(
                RefusalCode.SHARES_INVALID, f"shares of {', '.join(culprits[:5])} cannot be opened"
            )
            raise BlamedError(refusal, culprits)
        return Opened(
            self.context,
            self.roster,
            self.sid,
            self.number,
            self._directory,
            self._signer,
            self_mask_key(self._secrets.self_seed, self.sid),
            masks,
            held,
        )

    def _opened(self, other: int, envelope: Envelope) -> shamir.Shares:
        channel = self._secrets.channel
        secret = channel.agree(self.roster.member(other).channel) + channel.decapsulate(envelope.channel)
        key = _channel_key(secret, self.sid, other, self.number)
        bound = (self.sid, other, self.number, envelope.channel, envelope.mask)
        data = open_seal(key, envelope.sealed, *bound)
        if len(data) != 2 * shamir.SHARE_BYTES:
            raise BadSealError("expected two shares")
        shares = np.frombuffer(data, np.dtype("<u4")).reshape(2, shamir.LIMBS).astype(np.uint32)
        if (shares.astype(np.uint64) >= shamir.PRIME).any():
            raise BadSealError("expected elements of the field")
        return shares


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """Before P2: everything is there but the vector."""

    context: Context
    roster: Roster
    sid: bytes
    number: int
    _directory: Directory = field(repr=False)
    _signer: Ed25519PrivateKey = field(repr=False)
    _self_mask: bytes = field(repr=False)
    _masks: Mapping[int, bytes] = field(repr=False)
    _held: Mapping[int, shamir.Shares] = field(repr=False)

    def mask(self, vectors: Sequence[Words]) -> Masked:
        """P2: mask vectors in place, one keystream over all of them; then `Masked.prove` says whose they are."""
        add = [self._self_mask, *(key for other, key in self._masks.items() if other > self.number)]
        subtract = [key for other, key in self._masks.items() if other < self.number]
        apply_all(vectors, add=add, subtract=subtract)
        return Masked(
            self.context, self.roster, self.sid, self.number, self._directory, self._signer, self._held
        )


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """After P2: waiting for the survivors."""

    context: Context
    roster: Roster
    sid: bytes
    number: int
    _directory: Directory = field(repr=False)
    _signer: Ed25519PrivateKey = field(repr=False)
    _held: Mapping[int, shamir.Shares] = field(repr=False)

    def prove(self, vector: bytes) -> InputProof:
        """Sign the digest of the masked vector, as it is sent."""
        return InputProof(vector, self._signer.sign(input_signed(self.sid, self.number, vector)))

    def consent(self, survivors: Collection[int]) -> tuple[Consented, bytes]:
        """P3: a signature over whose inputs have arrived.

        Raises:
            RefusedError: SURVIVORS_INVALID; they are too few, not among those who shared, or without this site.
        """
        found = frozenset(survivors)
        if not found <= set(self._held):
            raise _bad_survivors("some that have not shared their seeds")
        if self.number not in found:
            raise _bad_survivors("all but this site, whose input was handed in")
        needed = max(self.context.needed(len(self.roster)), self.context.least)
        if len(found) < needed:
            raise _bad_survivors(f"{len(found)} members, where {needed} are needed")
        signature = self._signer.sign(consent_signed(self.sid, self.number, self.roster, found))
        state = Consented(
            self.context, self.roster, self.sid, self.number, found, self._directory, self._held
        )
        return state, signature


@dataclass(frozen=True, slots=True, eq=False)
class Consented:
    """After P3: waiting for the others' consents."""

    context: Context
    roster: Roster
    sid: bytes
    number: int
    survivors: frozenset[int]
    _directory: Directory = field(repr=False)
    _held: Mapping[int, shamir.Shares] = field(repr=False)

    def reveal(self, consents: Mapping[int, bytes]) -> Reveal:
        """P4: this site's shares. The caller has made it durable that it revealed them, and does so once.

        Raises:
            RefusedError: CONSENTS_INVALID; not enough members have consented to these very survivors.
        """
        needed = self.context.needed(len(self.roster))
        if self.context.consistency:
            good = sum(
                number in self.survivors and self._has_consented(number, signature)
                for number, signature in consents.items()
            )
            if good < needed:
                raise _no(
                    RefusalCode.CONSENTS_INVALID,
                    f"expected {needed} members' consents to the survivors that this site has consented to, found "
                    f"{good} of {len(consents)}",
                )
        chosen = [self._held[number][1 if number in self.survivors else 0] for number in sorted(self._held)]
        return Reveal(np.stack(chosen))

    def _has_consented(self, number: int, signature: bytes) -> bool:
        key = self._directory.key(self.roster.member(number).site)
        return verified(key, signature, consent_signed(self.sid, number, self.roster, self.survivors))


def apply_all(vectors: Sequence[Words], *, add: Sequence[bytes] = (), subtract: Sequence[bytes] = ()) -> None:
    """Apply masks to several vectors in place, each where the keystreams of the one before it have ended."""
    block = 0
    for vector in vectors:
        apply_masks(vector, add=add, subtract=subtract, first_block=block)
        block += blocks_of(vector)


def self_mask_key(seed: bytes, sid: bytes) -> bytes:
    """The key of the mask that hides a member's input even when its mask key is known."""
    return derive(seed, KEY_BYTES, "self", salt=sid)


def recovery_key(mask_seed: bytes, sid: bytes, other: int) -> bytes:
    """The key that seals what a member has encapsulated for another, for whoever rebuilds its seed."""
    return derive(mask_seed, KEY_BYTES, "recovery", other, salt=sid)


def verified(key: bytes | None, signature: bytes, signed: bytes) -> bool:
    """Whether this is an Ed25519 signature under a public key; none is under no key, or under what is none."""
    if key is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True


def _check_roster(context: Context, own: Advertisement, roster: Roster, directory: Directory) -> None:
    if not context.least <= len(roster) <= context.most:
        raise _bad_roster(f"{len(roster)} members, where {context.least} to {context.most} may be")
    names = [member.site for member in roster.members]
    if names != sorted(set(names)):
        raise _bad_roster("members that are not in order, or there twice")
    if own not in roster.members:
        raise _bad_roster("no advertisement as this site has sent it")
    if (directory.federation, directory.epoch) != (context.federation, context.epoch):
        raise _bad_roster(f"keys of epoch {context.epoch}, where this site has those of {directory.epoch}")
    keys = [key for member in roster.members for key in (member.channel, member.mask, member.commitment)]
    if len(set(keys)) != len(keys):
        raise _bad_roster("a key that two have, or that serves twice")
    for member in roster.members:
        if member.context != own.context:
            raise _no(
                RefusalCode.CONTEXT_DIFFERS,
                f"{member.site} was asked for something else than this site: another model, or other terms",
            )
        key = directory.key(member.site)
        if key is None:
            raise _bad_roster(f"{member.site}, which is not in the signed directory of sites")
        if not verified(key, member.signature, member.signed()):
            raise _bad_roster(f"keys of {member.site} that it has not signed")
        if shard_of(context, member.site) != context.shard:
            raise _bad_roster(f"{member.site}, which belongs to another shard")


def _channel_key(secret: bytes, sid: bytes, sender: int, recipient: int) -> bytes:
    return derive(secret, KEY_BYTES, "channel", sender, recipient, salt=sid)


def _seal_recovery(mask_seed: bytes, sid: bytes, other: int, secret: bytes) -> bytes:
    return seal(recovery_key(mask_seed, sid, other), secret, sid, other)


def _bad_roster(found: str) -> RefusedError:
    return _no(RefusalCode.ROSTER_INVALID, f"expected the keys of this session's members, found {found}")


def _bad_survivors(found: str) -> RefusedError:
    return _no(
        RefusalCode.SURVIVORS_INVALID, f"expected the members whose inputs have arrived, found {found}"
    )


def _no(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
