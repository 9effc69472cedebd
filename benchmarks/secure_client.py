"""S3 and S5: what one site does for a secure sum, and all that it sends.

    python -m benchmarks.secure_client FILE --size 1000000 [--repeat N]

FILE is a cohort's session, of vectors of any size: the site in the middle of the roster takes its part again, this
time with a vector of `--size` elements. Prints {"seconds": [...], ..., "upload_bytes": N, "most_upload_bytes": N}.
`seconds` are P0 to P4, the digest of the masked vector included and the encoding, `encode_seconds`, not; the site that
sends most is the first, whose side of a KEM is with all others. Its shares, and as far as the session's
vectors go what it has masked, are compared with those of the session.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.cohort import Entropy, name_of, signer, vectors_of
from benchmarks.floors.secure import only_cores
from benchmarks.secure_session import Session
from benchmarks.session_file import load
from fedge.secagg import site
from fedge.secagg.ring import Words
from fedge.secagg.session import Advertisement, InputProof, Reveal, Shares
from fedge.secagg.site import Rules
from fedge.vector import digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import secure as codec
from fedge.wire.chunks import frames
from fedge.wire.codec import encode_order_id


@dataclass
class Part:
    """A site's part in a session, once: what it says, and how long each phase has taken."""

    advertisement: Advertisement
    shares: Shares
    data: bytes
    proof: InputProof
    consent: bytes
    reveal: Reveal
    seconds: dict[str, float] = field(default_factory=dict)


def take_part(session: Session, number: int, vectors: list[Words], size: int) -> Part:
    """Everything that site `number` does; `vectors` are masked in place."""
    name, entropy, coordinator = name_of(number), Entropy(number), session.until_masked()
    roster, envelopes, ending = coordinator.roster(name), coordinator.envelopes(name), session.endings[0]
    numbers = {member.site: at for at, member in enumerate(roster.members, 1)}
    consents = {numbers[other]: signature for other, signature in ending.consents.items()}
    encoding = session.terms.encoding(size, session.context.digest)
    context = replace(session.context, shard=coordinator.shard(name))
    key, rules = signer(number), Rules()
    marks = [time.perf_counter()]
    advertised, advertisement = site.advertise(context, name, key, rules, entropy)
    marks.append(time.perf_counter())
    shared, shares = advertised.share(roster, session.directory, entropy)
    marks.append(time.perf_counter())
    opened = shared.open(envelopes)
    marks.append(time.perf_counter())
    masked = opened.mask(vectors)
    data = encoding.pack(vectors)
    proof = masked.prove(digest_of(data))
    marks.append(time.perf_counter())
    consented, consent = masked.consent([numbers[other] for other in ending.survivors])
    marks.append(time.perf_counter())
    reveal = consented.reveal(consents)
    marks.append(time.perf_counter())
    phases = ("advertise", "share", "open", "mask", "consent", "reveal")
    seconds = {f"{what}_seconds": b - a for what, a, b in zip(phases, marks, marks[1:], strict=False)}
    seconds["seconds"] = marks[-1] - marks[0]
    return Part(advertisement, shares, data, proof, consent, reveal, seconds)


def check(session: Session, number: int, part: Part) -> None:
    """Compare a part with the one that the same site had in the session.

    Raises:
        AssertionError: they differ.
    """
    name = name_of(number)
    assert part.advertisement == session.advertisements[name]
    assert (part.reveal.shares == session.endings[0].reveals[name].shares).all()
    if not session.terms.suite.has_kem:  # a KEM's secrets are fresh each time, and so are the masks
        ring, size = session.encoding.rings[0]
        whole = ring.packed_bytes(size) - 1  # of the last byte, the rest is the next element's
        assert part.data[:whole] == session.inputs[name][1][:whole]


def upload_bytes(session: Session, part: Part) -> int:
    """The bytes of all messages of fedge.proto in which it leaves this site, chunks of the vector included."""
    run_id, id = session.context.run_id, encode_order_id(session.context.order)
    member, envelopes = codec.encode_member(part.advertisement), codec.encode_shares(part.shares)
    shares = codec.encode_reveal(part.reveal)
    said = (
        pb.ClientMessage(advertise=pb.Advertise(run_id=run_id, id=id, member=member)),
        pb.ClientMessage(share=pb.Share(run_id=run_id, id=id, envelopes=envelopes)),
        pb.ClientMessage(consent=pb.Consent(run_id=run_id, id=id, signature=part.consent)),
        pb.ClientMessage(reveal=pb.Reveal(run_id=run_id, id=id, shares=shares)),
    )
    blob = pb.Blob(digest=part.proof.digest, size=len(part.data))
    update = pb.Update(run_id=run_id, id=id, num_examples=1, vector=blob, proof=part.proof.signature)
    delivered = pb.DeliverRequest(update=update).ByteSize()
    chunks = sum(map(len, frames(memoryview(part.data), deliver=True)))
    return sum(message.ByteSize() for message in said) + delivered + chunks


def vectors_for(session: Session, number: int, size: int) -> tuple[list[Words], float]:
    """The session's vectors of that site, with more elements behind; and how long it takes to encode so many."""
    body, tail = vectors_of(number, session.size, session.encoding)
    began = time.perf_counter()
    longer, _ = vectors_of(number, size, session.terms.encoding(size, session.context.digest))
    seconds = time.perf_counter() - began
    longer[: len(body)] = body
    return [longer, tail], seconds


def parts(session: Session, number: int, size: int, repeat: int) -> Iterator[Part]:
    """The part of one site, again and again."""
    vectors, encoding = vectors_for(session, number, size)
    for _ in range(repeat):
        part = take_part(session, number, [np.copy(vector) for vector in vectors], size)
        check(session, number, part)
        part.seconds["encode_seconds"] = encoding
        yield part


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()
    only_cores(1)
    session = load(given.file)
    found = list(parts(session, len(session.advertisements) // 2, given.size, given.repeat))
    (first,) = parts(session, 1, given.size, 1)
    timed = {name: [part.seconds[name] for part in found] for name in found[0].seconds}
    sent = {"upload_bytes": found[-1], "most_upload_bytes": first}
    print(json.dumps({**timed, **{name: upload_bytes(session, part) for name, part in sent.items()}}))


if __name__ == "__main__":
    main()
