"""Whole sessions of secure aggregation in one process: sites and a coordinator, with nothing between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedge.events import OrderId
from fedge.privacy.secure import SecureSource
from fedge.secagg import server, site
from fedge.secagg.directory import Directory, Statement
from fedge.secagg.keys import Suite
from fedge.secagg.ring import Ring, Words
from fedge.secagg.session import MAX_MEMBERS, Advertisement, Context, Reveal
from fedge.secagg.site import Rules, apply_all

FEDERATION = "0123456789abcdef"


class Stream:
    """Entropy for tests: reproducible, from a number."""

    def __init__(self, seed: int) -> None:
        self._source = SecureSource(seed.to_bytes(32, "little"))

    def __call__(self, count: int) -> bytes:
        return self._source.uint32(-(-count // 4)).tobytes()[:count]


def signer(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def name(number: int) -> str:
    return f"site-{number:03}"


def directory_of(count: int, epoch: int = 1) -> Directory:
    statements = [Statement(name(n), public(signer(n)), 0, 2**33) for n in range(1, count + 1)]
    return Directory.of(FEDERATION, epoch, statements)


def context(**changes: Any) -> Context:
    plain = Context(
        federation=FEDERATION,
        run_id="run-1",
        order=OrderId("train", 3),
        suite=Suite.X25519,
        vectors=b"v" * 32,
        privacy=b"p" * 32,
        offer=b"o" * 32,
        model=b"m" * 32,
        least=3,
        most=MAX_MEMBERS,
        threshold_ppm=666_667,
        epoch=1,
    )
    return replace(plain, **changes)


@dataclass
class Play:
    """A session among `count` sites, step by step; who drops out before a phase is named before it."""

    count: int
    context: Context = field(default_factory=context)
    rules: Rules = field(default_factory=Rules)
    seed: int = 0
    directory: Directory = field(init=False)
    sites: dict[int, Any] = field(default_factory=dict)
    """Each one's newest value, by its number in the roster, which is that in its name."""

    def __post_init__(self) -> None:
        self.directory = directory_of(self.count)
        self.entropy = {n: Stream(1000 * self.seed + n) for n in range(1, self.count + 1)}

    def advertise(self, numbers: Collection[int] | None = None) -> dict[int, Advertisement]:
        out = {}
        for n in numbers if numbers is not None else range(1, self.count + 1):
            self.sites[n], out[n] = site.advertise(
                self.context, name(n), signer(n), self.rules, self.entropy[n]
            )
        return out

    def gather(self, advertisements: Mapping[int, Advertisement]) -> server.Sharing:
        gathering = server.Gathering(self.context, self.directory)
        for advertisement in advertisements.values():
            gathering = gathering.take(advertisement)
        return gathering.close()

    def share(self, sharing: server.Sharing, without: Collection[int] = ()) -> server.Collecting:
        for n in sharing.roster.numbers:
            if n not in without:
                self.sites[n], shares = self.sites[n].share(sharing.roster, self.directory, self.entropy[n])
                sharing = sharing.take(n, shares)
        return sharing.close()

    def input(
        self,
        collecting: server.Collecting,
        vectors: Mapping[int, Sequence[Words]],
        without: Collection[int] = (),
    ) -> tuple[server.Consenting, list[Words]]:
        total: list[Words] = []
        for n in sorted(set(collecting.shares) - set(without)):
            opened = self.sites[n].open(collecting.envelopes(n))
            masked = [vector.copy() for vector in vectors[n]]
            self.sites[n] = opened.mask(masked)
            proof = self.sites[n].prove(b"%032d" % n)
            collecting = collecting.take(n, proof)
            total = [a + b for a, b in zip(total, masked, strict=True)] if total else masked
        return collecting.close(), total

    def consent(self, consenting: server.Consenting, without: Collection[int] = ()) -> server.Consenting:
        for n in sorted(consenting.survivors - set(without)):
            self.sites[n], signature = self.sites[n].consent(consenting.survivors)
            if self.context.consistency:
                consenting = consenting.take(n, signature)
        return consenting

    def reveal(self, consenting: server.Consenting, without: Collection[int] = ()) -> server.Revealing:
        revealing = consenting.close()
        asked = consenting.consents if self.context.consistency else consenting.survivors
        for n in sorted(set(asked) - set(without)):
            revealing = revealing.take(n, self.sites[n].reveal(consenting.consents))
        return revealing


def finish(revealing: server.Revealing, total: list[Words]) -> list[Words]:
    recovered = revealing.recover()
    apply_all(total, add=recovered.add, subtract=recovered.subtract)
    return total


def vectors_for(count: int, *, size: int, bits: int, seed: int = 0) -> dict[int, list[Words]]:
    """A body in the ring of so many bits and a tail in 64, for each."""
    rng = np.random.default_rng(seed)
    body, tail = Ring(bits), Ring(64)
    return {
        n: [
            rng.integers(0, body.modulus, size, np.uint64).astype(body.dtype),
            rng.integers(0, 2**63, 3, np.uint64).astype(tail.dtype),
        ]
        for n in range(1, count + 1)
    }


def plain_sum(vectors: Mapping[int, Sequence[Words]], members: Collection[int], bits: int) -> list[Words]:
    """What the session is to give: the sum in the ring."""
    rings = [Ring(bits), Ring(64)]
    out = []
    for at, ring in enumerate(rings):
        total = [0] * len(next(iter(vectors.values()))[at])
        for n in members:
            total = [(a + int(b)) % ring.modulus for a, b in zip(total, vectors[n][at], strict=True)]
        out.append(np.array(total, ring.dtype))
    return out


def same(found: Sequence[Words], expected: Sequence[Words], bits: int) -> bool:
    masks = [Ring(bits).dtype.type(Ring(bits).modulus - 1), Ring(64).dtype.type(2**64 - 1)]
    return all((a & m == b & m).all() for a, b, m in zip(found, expected, masks, strict=True))


def whole(
    play: Play, drops: Mapping[str, Collection[int]], vectors: Mapping[int, Sequence[Words]]
) -> tuple[list[Words], frozenset[int]]:
    """From beginning to end, with `drops` before each phase: (the sum, whose it is)."""
    everybody = set(range(1, play.count + 1))
    adverts = play.advertise(sorted(everybody - set(drops.get("advertise", ()))))
    sharing = play.gather(adverts)
    # Numbers are those of the roster: whoever has not advertised has none.
    if drops.get("advertise"):
        names = [int(member.site.rpartition("-")[2]) for member in sharing.roster.members]
        play.sites = {at: play.sites[n] for at, n in enumerate(names, 1)}
        play.entropy = {at: play.entropy[n] for at, n in enumerate(names, 1)}
        vectors = {at: vectors[n] for at, n in enumerate(names, 1)}
    gone = set(drops.get("share", ()))
    collecting = play.share(sharing, gone)
    consenting, total = play.input(collecting, vectors, drops.get("input", ()))
    consenting = play.consent(consenting, drops.get("consent", ()))
    revealing = play.reveal(consenting, drops.get("reveal", ()))
    return finish(revealing, total), consenting.survivors


def reveal_of(shares: np.ndarray[Any, Any]) -> Reveal:
    return Reveal(shares.astype(np.uint32))
