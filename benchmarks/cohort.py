"""A cohort that plays a secure sum to its end in one process, and what it has sent, kept in a file.

    python -m benchmarks.cohort FILE --sites 100 --size 1000000 [--suite 2] [--bits 32] [--drops 0 10]

Every site is real: it has keys of its own, checks everything, and masks a vector of its own. That is what a coordinator
(`secure_server`) or one of the sites (`secure_client`) then does its work on, as often as wanted. `--drops` are
percentages of the members of each sum that go away once seeds are shared, before they hand in their vector. Prints
for each of them how many survive, and how many masks are on their sums.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding as KeyEncoding
from cryptography.hazmat.primitives.serialization import PublicFormat

from benchmarks.secure_session import FEDERATION, Ending, Session, context_of
from benchmarks.session_file import save
from fedge.privacy.secure import SecureSource
from fedge.secagg import site as member
from fedge.secagg.directory import Directory, Statement
from fedge.secagg.encoding import Encoding, mean_of
from fedge.secagg.keys import Suite
from fedge.secagg.ring import Words
from fedge.secagg.site import Rules
from fedge.secagg.terms import SumTerms, least_of
from fedge.vector import digest_of
from fedge_server.secure_sum import SecureSum

METRICS = {"loss": 0.5, "accuracy": 0.75}


class Entropy:
    """A site's, from its number: whoever plays the site again makes the same keys."""

    def __init__(self, number: int) -> None:
        self._source = SecureSource(number.to_bytes(32, "little"))

    def __call__(self, count: int) -> bytes:
        return self._source.uint32(-(-count // 4)).tobytes()[:count]


def name_of(number: int) -> str:
    return f"site-{number:04}"


def signer(number: int) -> Ed25519PrivateKey:
    """A site's identity."""
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def vectors_of(number: int, size: int, encoding: Encoding) -> list[Words]:
    """A site's update, encoded; always the same."""
    vector = np.random.default_rng(number).random(size, np.float32) - np.float32(0.5)
    return encoding.encode(vector, 1, METRICS, SecureSource(number.to_bytes(32, "big")))


def play(sites: int, size: int, *, suite: Suite, bits: int, drops: Iterable[int]) -> Session:
    """Everybody's part, from keys to revealed shares."""
    terms = SumTerms(
        least_of(2 * sites // 3, sites), sites, 1.0, suite=suite, bits=bits, metrics=tuple(METRICS)
    )
    numbers = {name_of(number): number for number in range(1, sites + 1)}
    raw = KeyEncoding.Raw, PublicFormat.Raw
    statements = [
        Statement(name, signer(n).public_key().public_bytes(*raw), 0, 2**33) for name, n in numbers.items()
    ]
    session = Session(terms, size, context_of(terms), Directory.of(FEDERATION, 1, statements), {}, {}, {}, {})
    return _played(session, numbers, drops)


def _played(session: Session, numbers: Mapping[str, int], drops: Iterable[int]) -> Session:
    directory, encoding = session.directory, session.encoding
    coordinator = SecureSum(session.context, directory, encoding)
    entropy = {name: Entropy(number) for name, number in numbers.items()}
    states: dict[str, Any] = {}
    advertisements, shares, inputs = {}, {}, {}
    for name, number in numbers.items():
        context = replace(session.context, shard=coordinator.shard(name))
        states[name], advertisements[name] = member.advertise(
            context, name, signer(number), Rules(), entropy[name]
        )
        coordinator.advertised(advertisements[name])
    coordinator.enlist(numbers)
    for name in numbers:
        states[name], shares[name] = states[name].share(coordinator.roster(name), directory, entropy[name])
        coordinator.shared(name, shares[name])
    coordinator.mask(numbers)
    gone = {drop: _gone(coordinator, numbers, drop) for drop in drops}
    totals: dict[int, dict[int, list[Words]]] = {drop: {} for drop in gone}
    for name, number in numbers.items():
        vectors = vectors_of(number, session.size, encoding)
        for drop in gone:
            if name not in gone[drop]:
                total = totals[drop].setdefault(coordinator.shard(name), encoding.zeros())
                for whole, part in zip(total, vectors, strict=True):
                    whole += part
        states[name] = states[name].open(coordinator.envelopes(name)).mask(vectors)
        data = encoding.pack(vectors)
        inputs[name] = states[name].prove(digest_of(data)), data
    endings = {
        drop: _ending(coordinator, encoding, states, numbers.keys() - gone[drop], totals[drop])
        for drop in gone
    }
    return replace(session, advertisements=advertisements, shares=shares, inputs=inputs, endings=endings)


def _gone(coordinator: SecureSum, sites: Iterable[str], percent: int) -> set[str]:
    """So many of each sum, spread over its roster. By chance alone a sum might be left with too few."""
    gone = set()
    for name in sites:
        number = coordinator.roster(name).number(name)
        assert number is not None
        if number * percent // 100 > (number - 1) * percent // 100:
            gone.add(name)
    return gone


def _ending(
    coordinator: SecureSum,
    encoding: Encoding,
    states: Mapping[str, Any],
    survivors: Collection[str],
    totals: Mapping[int, list[Words]],
) -> Ending:
    by_shard: dict[int, dict[int, str]] = {}
    for name in sorted(survivors):
        by_shard.setdefault(coordinator.shard(name), {})[states[name].number] = name
    consents, reveals, masks, agreements = {}, {}, 0, 0
    for alive in by_shard.values():
        first = states[next(iter(alive.values()))]
        needed, others = first.context.needed(len(first.roster)), len(first.roster) - len(alive)
        agreements += others * len(alive)
        masks += (1 + others) * len(alive)
        consented = {number: states[name].consent(alive) for number, name in alive.items()}
        consents.update({alive[number]: signature for number, (_, signature) in consented.items()})
        shown = {number: consented[number][1] for number in list(alive)[:needed]}
        reveals.update({alive[number]: state.reveal(shown) for number, (state, _) in consented.items()})
    summed = [encoding.decode(totals[shard], len(by_shard[shard])) for shard in sorted(by_shard)]
    mean = mean_of(summed, sorted(survivors)).vector
    return Ending(tuple(sorted(survivors)), consents, reveals, mean, masks, agreements)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--suite", type=int, default=1)
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--drops", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    session = play(given.sites, given.size, suite=Suite(given.suite), bits=given.bits, drops=given.drops)
    save(session, given.file)
    counts = {
        drop: {"survivors": len(end.survivors), "masks": end.masks, "agreements": end.agreements}
        for drop, end in session.endings.items()
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
