"""Seeds for simulation and training, derived from the run's: never for the keys, masks or noise of a device."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(run.seed, "batches", site, round)`.

    The same on every machine and in every process; different parts give unrelated seeds.
    """
    text = str(seed)
    for part in parts:
        text += f"\0str:{part}" if type(part) is str else f"\0{type(part).__name__}:{part}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def derive_key(seed: int, *parts: str | int) -> bytes:
    """32 bytes for a simulated client's noise: reproducible, and so no secret. A device draws its own."""
    text = "\0".join(["key", str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return hashlib.sha256(text.encode()).digest()


def work_seed(seed: int, *, site: str, kind: str, round: int) -> int:
    """The seed of one client's work in one round, the same in simulation and deployment.

    A gradient's batches come from one permutation per epoch, so its seed does not depend on the round.
    """
    return derive_seed(seed, kind, site) if kind == "gradient" else derive_seed(seed, kind, site, round)
