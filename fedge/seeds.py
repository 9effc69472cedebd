"""Seeds for simulation and training, derived from the run's: never for keys, masks or noise."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(run.seed, "batches", site, round)`.

    The same on every machine and in every process; different parts give unrelated seeds.
    """
    text = "\0".join([str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
