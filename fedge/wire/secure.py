"""The messages of secure aggregation to values and back. What a peer sends is data: sessions check it before use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedge.errors import ConfigError, LimitError, RemoteProtocolError
from fedge.principal import check_name
from fedge.secagg import shamir
from fedge.secagg.keys import Suite
from fedge.secagg.noise import Noise
from fedge.secagg.session import MAX_MEMBERS, Advertisement, Envelope, Reveal, Roster, Shares
from fedge.secagg.terms import SumTerms
from fedge.wire import fedge_pb2 as pb

_WORD = np.dtype("<u4")
_SHARE_BYTES = shamir.LIMBS * _WORD.itemsize


def encode_sum_terms(terms: SumTerms) -> pb.SecureAggregation:
    noise = terms.noise
    return pb.SecureAggregation(
        suite=terms.suite,
        bits=terms.bits,
        least=terms.least,
        threshold_ppm=terms.threshold_ppm,
        consistency=terms.consistency,
        clients=terms.clients,
        bound=terms.bound,
        max_weight=terms.max_weight,
        rotate=terms.rotate,
        metrics=terms.metrics,
        noise=pb.Noise(size=noise.size, steps=noise.steps, variance=noise.variance) if noise else None,
    )


def decode_sum_terms(message: pb.SecureAggregation) -> SumTerms:
    """How a run's updates are summed, if sums like that are possible.

    Raises:
        RemoteProtocolError: they are not.
    """
    noise = message.noise
    try:
        return SumTerms(
            least=message.least,
            clients=message.clients,
            bound=message.bound,
            suite=Suite(message.suite),
            bits=message.bits,
            threshold_ppm=message.threshold_ppm,
            consistency=message.consistency,
            max_weight=message.max_weight,
            rotate=message.rotate,
            metrics=tuple(message.metrics),
            noise=Noise(noise.size, noise.steps, noise.variance) if message.HasField("noise") else None,
        )
    except ValueError as error:
        raise RemoteProtocolError(f"not terms of secure aggregation: {error}") from None


def encode_member(advertisement: Advertisement) -> pb.Member:
    return pb.Member(
        site=advertisement.site,
        context=advertisement.context,
        channel=advertisement.channel,
        mask=advertisement.mask,
        commitment=advertisement.commitment,
        signature=advertisement.signature,
    )


def decode_member(message: pb.Member, *, site: str) -> Advertisement:
    """What this site advertises, unchecked."""
    return Advertisement(
        site, message.context, message.channel, message.mask, message.commitment, message.signature
    )


def encode_members(roster: Roster) -> list[pb.Member]:
    return [encode_member(each) for each in roster.members]


def decode_roster(messages: Iterable[pb.Member]) -> Roster:
    """A roster as it was sent, in its order, unchecked but for its members' names.

    Raises:
        LimitError: it has more members than a session may have.
        RemoteProtocolError: a name is none.
    """
    members = list(messages)
    _check_count("a roster", len(members))
    try:
        return Roster(tuple(decode_member(each, site=check_name(each.site)) for each in members))
    except ConfigError as error:
        raise RemoteProtocolError(f"roster: {error}") from None


def encode_shares(shares: Shares) -> list[pb.Envelope]:
    """A member's envelopes, each with what stays with the coordinator."""
    return [
        pb.Envelope(
            number=number,
            sealed=each.sealed,
            channel=each.channel,
            mask=each.mask,
            recovery=shares.recovery.get(number, b""),
        )
        for number, each in shares.envelopes.items()
    ]


def decode_shares(messages: Iterable[pb.Envelope]) -> Shares:
    """What `encode_shares` was given.

    Raises:
        LimitError, RemoteProtocolError: as `decode_envelopes`.
    """
    messages = list(messages)
    envelopes = decode_envelopes(messages)
    return Shares(envelopes, {each.number: each.recovery for each in messages if each.recovery})


def encode_envelopes(envelopes: Mapping[int, Envelope]) -> list[pb.Envelope]:
    """What others have sealed for a member."""
    return [
        pb.Envelope(number=number, sealed=each.sealed, channel=each.channel, mask=each.mask)
        for number, each in envelopes.items()
    ]


def decode_envelopes(messages: Iterable[pb.Envelope]) -> dict[int, Envelope]:
    """Envelopes by number, unchecked but for that.

    Raises:
        LimitError: they are more than a session has members.
        RemoteProtocolError: two have one number.
    """
    messages = list(messages)
    _check_count("envelopes", len(messages))
    envelopes = {each.number: Envelope(each.sealed, each.channel, each.mask) for each in messages}
    if len(envelopes) != len(messages):
        raise RemoteProtocolError("expected one envelope of each number, found two of one")
    return envelopes


def encode_consents(run_id: str, order: pb.OrderId, consents: Mapping[int, bytes]) -> pb.Consents:
    return pb.Consents(run_id=run_id, id=order, numbers=consents.keys(), signatures=consents.values())


def decode_consents(message: pb.Consents) -> dict[int, bytes]:
    """Signatures by number, unchecked but for that.

    Raises:
        LimitError: they are more than a session has members.
        RemoteProtocolError: two have one number, or one has none.
    """
    _check_count("consents", max(len(message.numbers), len(message.signatures)))
    consents = dict(zip(message.numbers, message.signatures, strict=False))
    if not len(consents) == len(message.numbers) == len(message.signatures):
        raise RemoteProtocolError("expected one consent of each number, found others")
    return consents


def encode_reveal(reveal: Reveal) -> bytes:
    return reveal.shares.astype(_WORD).tobytes()


def decode_reveal(data: bytes) -> Reveal:
    """Shares of as many members as there are, unchecked.

    Raises:
        RemoteProtocolError: they are cut off, or of more members than a session has.
    """
    count, rest = divmod(len(data), _SHARE_BYTES)
    if rest or count > MAX_MEMBERS:
        raise RemoteProtocolError(
            f"expected shares of {_SHARE_BYTES} bytes of at most {MAX_MEMBERS} members, found {len(data)} bytes"
        )
    return Reveal(np.frombuffer(data, _WORD).reshape(count, shamir.LIMBS).astype(np.uint32))


def _check_count(what: str, count: int) -> None:
    if count > MAX_MEMBERS:
        raise LimitError(f"expected {what} of at most {MAX_MEMBERS} members, found {count}")
