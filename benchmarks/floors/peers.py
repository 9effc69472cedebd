"""Other people's secure sums: Flower's utilities, and TenSEAL's CKKS. Neither fedge nor numpy types of ours.

    python -m benchmarks.floors.peers has|mask|shamir|client|server|upload flower|ckks [--size N] [--sites N] ...

By whatever interpreter has them: see `secure_peers`. `has` only imports them. Else prints {"seconds": [...]}, or with
`upload` {"upload_bytes": N}, on one core. `server` of Flower is measured on one of its clients and multiplied.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

Once = Callable[[], object]
_RANGE = 1 << 32
_TARGET = 1 << 22
"""Flower's own defaults: modulus and range of quantised numbers."""


class Flower:
    """SecAgg with a complete graph, as `secaggplus_mod` and its workflow do it, by the utilities of flwr.common."""

    def __init__(self, given: argparse.Namespace) -> None:
        secure = "flwr.common.secure_aggregation"
        self.sums = import_module(f"{secure}.ndarrays_arithmetic")
        self.utils = import_module(f"{secure}.secaggplus_utils")
        self.sharing = import_module(f"{secure}.crypto.shamir")
        self.cipher = import_module(f"{secure}.crypto.symmetric_encryption")
        self.quantize = import_module(f"{secure}.quantization").quantize
        asymmetric = import_module("flwr.supercore.primitives.asymmetric")
        self.keys, self.as_bytes = asymmetric.generate_key_pairs, asymmetric.private_key_to_bytes
        self.sites, self.size, self.threshold = given.sites, given.size, 2 * given.sites // 3 + 1
        self.gone = given.sites * given.drop // 100

    def mask(self) -> Once:
        vector, seed = [np.zeros(self.size, np.int64)], os.urandom(32)

        def once() -> None:
            mask = self.utils.pseudo_rand_gen(seed, _RANGE, [(self.size,)])
            self.sums.parameters_mod(self.sums.parameters_addition(vector, mask), _RANGE)

        return once

    def shamir(self) -> Once:
        secrets = [os.urandom(32) for _ in range(2)]

        def once() -> None:
            for secret in secrets:
                shares = self.sharing.create_shares(secret, self.threshold, self.sites)
                assert self.sharing.combine_shares(shares[: self.threshold]) == secret

        return once

    def client(self) -> Once:
        self.theirs = [self.keys()[1] for _ in range(self.sites - 1)]
        self.vector = self.quantize([np.zeros(self.size, np.float32)], 8.0, _TARGET)
        return self._client

    def _client(self) -> tuple[list[bytes], Any]:
        """Keys, shares for the others, theirs, and the masked vector: what a client sends, and the vector."""
        own, _ = self.keys()
        channel, _ = self.keys()
        seed = os.urandom(32)
        secrets = (seed, self.as_bytes(own))
        shares = [self.sharing.create_shares(secret, self.threshold, self.sites) for secret in secrets]
        sealed, vector = [], self.vector
        keys = [self.cipher.generate_shared_key(channel, other) for other in self.theirs]
        for at, key in enumerate(keys):
            text = self.utils.share_keys_plaintext_concat(0, at + 1, shares[0][at], shares[1][at])
            sealed.append(self.cipher.encrypt(key, text))
        for key, text in zip(keys, sealed, strict=True):
            self.utils.share_keys_plaintext_separate(self.cipher.decrypt(key, text))
        dimensions = [part.shape for part in vector]
        vector = self.sums.parameters_addition(vector, self.utils.pseudo_rand_gen(seed, _RANGE, dimensions))
        for at, other in enumerate(self.theirs):
            mask = self.utils.pseudo_rand_gen(self.cipher.generate_shared_key(own, other), _RANGE, dimensions)
            way = self.sums.parameters_subtraction if at % 2 else self.sums.parameters_addition
            vector = way(vector, mask)
        return [*sealed, *shares[0]], self.sums.parameters_mod(vector, _RANGE)

    def server(self) -> Once:
        """Seconds, scaled: secrets are rebuilt from all shares that came, and masks taken off one by one."""
        alive = self.sites - self.gone
        own, other, vector = self.keys()[0], self.keys()[1], [np.zeros(self.size, np.int64)]
        secrets = {os.urandom(32): alive, self.as_bytes(own): self.gone}
        shares = {
            count: self.sharing.create_shares(secret, self.threshold, self.sites)[:alive]
            for secret, count in secrets.items()
            if count
        }

        def once() -> float:
            rebuilding = sum(
                count * _seconds(partial(self.sharing.combine_shares, of)) for count, of in shares.items()
            )
            adding = _best(lambda: self.sums.parameters_addition(vector, vector))
            masking = _best(
                lambda: self.sums.parameters_subtraction(
                    vector, self.utils.pseudo_rand_gen(os.urandom(32), _RANGE, [(self.size,)])
                )
            )
            agreeing = _best(lambda: self.cipher.generate_shared_key(own, other))
            pairs = self.gone * alive
            total: float = rebuilding + alive * (adding + masking) + pairs * (masking + agreeing)
            return total

        return once

    def upload(self) -> int:
        ndarray_to_bytes = import_module("flwr.common").ndarray_to_bytes
        self.client()
        small, vector = self._client()
        return sum(map(len, small)) + sum(len(ndarray_to_bytes(part)) for part in vector)


class Ckks:
    """The parameters that NVFlare's own examples use."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.scheme = tenseal = import_module("tenseal")
        self.vector = np.random.default_rng(0).random(given.size).tolist()
        self.context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40])
        self.context.global_scale = 2**40

    def client(self) -> Once:
        return lambda: self.scheme.ckks_vector(self.context, self.vector)

    def upload(self) -> int:
        return len(self.scheme.ckks_vector(self.context, self.vector).serialize())


def _seconds(once: Once) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began


def _best(once: Once) -> float:
    """The fastest of some: the first finds no memory that is used already."""
    return min(_seconds(once) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("whose", choices=("flower", "ckks"))
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--drop", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    if given.what == "has":
        given.size = 1
    peer = Flower(given) if given.whose == "flower" else Ckks(given)
    if given.what == "has":
        print("yes")
        return
    if given.what == "upload":
        print(json.dumps({"upload_bytes": peer.upload()}))
        return
    once = getattr(peer, given.what)()
    if given.what == "server":
        seconds = [once() for _ in range(given.repeat)]
    else:
        seconds = [_seconds(once) for _ in range(given.repeat)]
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
