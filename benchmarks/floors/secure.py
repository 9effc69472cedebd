"""The floors of secure aggregation: bare keystreams, additions, key agreements and signatures, as many as are needed.

    python -m benchmarks.floors.secure mask    [--size N] [--piece BYTES] [--repeat N]
    python -m benchmarks.floors.secure shamir  [--shares N] [--threshold N] [--repeat N]
    python -m benchmarks.floors.secure work    [--size N] [--vectors N] [--masks N] [--agreements N] [--signatures N]
                                               [--encapsulations N] [--decapsulations N] [--repeat N]

Prints {"seconds": [...]}. `mask` is one keystream added to a vector; `shamir` shares and rebuilds two secrets of 32
bytes with Python's own integers modulo one prime of 257 bits; `work` is everything that a site or a coordinator cannot
do without. All on one core, and without fedge.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so that every secret of 32 bytes is an element."""

PIECE_BYTES = 1 << 17
_SPARE = 15
_KEYS = 16
"""Key pairs that agreements and signatures take turns with."""


def only_cores(count: int) -> None:
    """Keep this process on so many of the cores that it may use; the last of them."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])


class Masks:
    """Adds keystreams to a vector (uint32), each drawn in pieces into one buffer that stays in the cache."""

    def __init__(self, piece: int = PIECE_BYTES) -> None:
        self._buffer: Any = np.empty(piece + _SPARE, np.uint8)  # as the library's types want no array
        self._zeros = bytes(piece)
        self._words = self._buffer[:piece].view(np.uint32)

    def add(self, vector: np.ndarray[tuple[int], np.dtype[np.uint32]], keys: list[bytes]) -> None:
        streams = [Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor() for key in keys]
        for start in range(0, len(vector), len(self._words)):
            part = vector[start : start + len(self._words)]
            data = memoryview(self._zeros)[: part.nbytes]
            for stream in streams:
                stream.update_into(data, self._buffer)
                np.add(part, self._words[: len(part)], out=part)


def split(secret: int, shares: int, threshold: int) -> list[int]:
    """Shares 1 to `shares`: a random polynomial's values, by Horner's rule."""
    coefficients = [secret, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))][::-1]
    out = []
    for point in range(1, shares + 1):
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        out.append(value)
    return out


def weights(points: list[int]) -> list[int]:
    """Lagrange's, at 0."""
    out = []
    for one in points:
        above = below = 1
        for other in points:
            if other != one:
                above = above * other % PRIME
                below = below * (other - one) % PRIME
        out.append(above * pow(below, -1, PRIME) % PRIME)
    return out


def shamir(given: argparse.Namespace) -> Callable[[], object]:
    wanted = [secrets.randbits(256) for _ in range(2)]

    def once() -> None:
        shared = [split(secret, given.shares, given.threshold) for secret in wanted]
        factors = weights(list(range(1, given.threshold + 1)))
        found = [sum(map(int.__mul__, factors, values[: given.threshold])) % PRIME for values in shared]
        assert found == wanted

    return once


def mask(given: argparse.Namespace) -> Callable[[], object]:
    masks, vector, key = Masks(given.piece), np.zeros(given.size, np.uint32), secrets.token_bytes(32)
    return lambda: masks.add(vector, [key])


def work(given: argparse.Namespace) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    vectors = [rng.integers(0, 2**32, given.size, np.uint32) for _ in range(given.vectors)]
    keys = [secrets.token_bytes(32) for _ in range(given.masks)]
    ours = X25519PrivateKey.generate()
    theirs = [X25519PrivateKey.generate().public_key() for _ in range(_KEYS)]
    signers = [Ed25519PrivateKey.generate() for _ in range(_KEYS)]
    signed = [(signer.public_key(), signer.sign(b"m" * 200)) for signer in signers]
    kem = MLKEM768PrivateKey.generate()
    public = kem.public_key()
    ciphertext = public.encapsulate()[1]

    def once() -> None:
        total = np.zeros(given.size, np.uint32)
        for vector in vectors:
            np.add(total, vector, out=total)
        for number in range(given.agreements):
            ours.exchange(theirs[number % _KEYS])
        for number in range(given.signatures):
            key, signature = signed[number % _KEYS]
            key.verify(signature, b"m" * 200)
        for _ in range(given.encapsulations):
            public.encapsulate()
        for _ in range(given.decapsulations):
            kem.decapsulate(ciphertext)
        Masks().add(total, keys)

    return once


def print_seconds(once: Callable[[], object], repeat: int) -> None:
    """Do it so often; prints {"seconds": [...]}."""
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("mask", "shamir", "work"))
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--piece", type=int, default=PIECE_BYTES)
    parser.add_argument("--shares", type=int, default=100)
    parser.add_argument("--threshold", type=int, default=67)
    for count in ("vectors", "masks", "agreements", "signatures", "encapsulations", "decapsulations"):
        parser.add_argument(f"--{count}", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()
    only_cores(1)
    print_seconds({"mask": mask, "shamir": shamir, "work": work}[given.what](given), given.repeat)


if __name__ == "__main__":
    main()
