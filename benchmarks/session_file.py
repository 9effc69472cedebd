"""A session in a file: the very messages that its sites have sent, one behind the other, and what came of them.

    numbers, terms, directory | of each site: Member, Share, Update | of each ending: Consents and Reveals, mean

Each part has its length before it. All of them are messages of fedge.proto, but for numbers (JSON) and means (float32).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.secure_session import Ending, Session, context_of
from fedge.secagg.session import InputProof
from fedge.signing import SignedDirectory
from fedge.vector import bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import secure as codec
from fedge.wire.keys import decode_directory, encode_directory

_LENGTH = struct.Struct("<Q")
_UNSIGNED = b"-"


def save(session: Session, path: Path) -> None:
    with path.open("wb") as file:
        for part in _parts(session):
            file.write(_LENGTH.pack(len(part)) + part)


def load(path: Path) -> Session:
    """A session that was saved."""
    parts = _read(path)
    numbers = json.loads(next(parts))
    terms = codec.decode_sum_terms(pb.SecureAggregation.FromString(next(parts)))
    directory = decode_directory(pb.Directory.FromString(next(parts))).directory
    advertisements, shares, inputs = {}, {}, {}
    for name in numbers["sites"]:
        advertisements[name] = codec.decode_member(pb.Member.FromString(next(parts)), site=name)
        shares[name] = codec.decode_shares(pb.Share.FromString(next(parts)).envelopes)
        update = pb.Update.FromString(next(parts))
        inputs[name] = InputProof(update.vector.digest, update.proof), update.vector.inline
    endings = {int(drop): _ending(found, parts) for drop, found in numbers["endings"].items()}
    return Session(
        terms, numbers["size"], context_of(terms), directory, advertisements, shares, inputs, endings
    )


def _parts(session: Session) -> Iterator[bytes]:
    endings = {
        drop: {"survivors": end.survivors, "masks": end.masks, "agreements": end.agreements}
        for drop, end in session.endings.items()
    }
    numbers = {"size": session.size, "sites": list(session.advertisements), "endings": endings}
    yield json.dumps(numbers).encode()
    yield codec.encode_sum_terms(session.terms).SerializeToString()
    yield encode_directory(SignedDirectory(session.directory, _UNSIGNED)).SerializeToString()
    for name, advertisement in session.advertisements.items():
        proof, data = session.inputs[name]
        blob = pb.Blob(digest=proof.digest, size=len(data), inline=data)
        yield codec.encode_member(advertisement).SerializeToString()
        yield pb.Share(envelopes=codec.encode_shares(session.shares[name])).SerializeToString()
        yield pb.Update(vector=blob, proof=proof.signature).SerializeToString()
    for ending in session.endings.values():
        for name in ending.survivors:
            yield pb.Consent(signature=ending.consents[name]).SerializeToString()
            yield pb.Reveal(shares=codec.encode_reveal(ending.reveals[name])).SerializeToString()
        yield bytes(bytes_of(ending.mean))


def _ending(numbers: dict[str, object], parts: Iterator[bytes]) -> Ending:
    survivors = tuple(map(str, _list(numbers["survivors"])))
    consents, reveals = {}, {}
    for name in survivors:
        consents[name] = pb.Consent.FromString(next(parts)).signature
        reveals[name] = codec.decode_reveal(pb.Reveal.FromString(next(parts)).shares)
    mean = np.frombuffer(next(parts), np.float32)
    masks, agreements = (int(str(numbers[name])) for name in ("masks", "agreements"))
    return Ending(survivors, consents, reveals, mean, masks, agreements)


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while head := file.read(_LENGTH.size):
            yield file.read(_LENGTH.unpack(head)[0])
