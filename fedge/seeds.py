"""Seeds for simulation and training, derived from the run's: never for the keys, masks or noise of a device."""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]

_GOLDEN: Final = 0x9E3779B97F4A7C15
_ALL: Final = (1 << 64) - 1


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(run.seed, "batches", site, round)`.

    The same on every machine and in every process; different parts give unrelated seeds.
    """
    text = str(seed)
    for part in parts:
        text += f"\0str:{part}" if type(part) is str else f"\0{type(part).__name__}:{part}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def mixed(keys: Numbers, salt: int) -> Numbers:
    """Numbers (uint64[n]) that look unrelated to `keys` and to those of any other salt (0 to 2^63 - 1): for draws of
    which there are too many to hash each by itself. No two keys have the same; nobody is kept from finding them out.

    The finaliser of splitmix64 (Steele et al. 2014, section 4).
    """
    found: Numbers = keys + np.uint64((salt + 1) * _GOLDEN & _ALL)  # with overflow, as all of this
    found ^= found >> np.uint64(30)
    found *= np.uint64(0xBF58476D1CE4E5B9)
    found ^= found >> np.uint64(27)
    found *= np.uint64(0x94D049BB133111EB)
    found ^= found >> np.uint64(31)
    return found


def stream(keys: Numbers, size: int) -> Numbers:
    """The first `size` numbers of splitmix64 from each key: uint64[n] -> uint64[n, size]."""
    steps = np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN)
    return mixed(np.add.outer(keys, steps).reshape(-1), 0).reshape(len(keys), size)


def derive_key(seed: int, *parts: str | int) -> bytes:
    """32 bytes for a simulated client's noise: reproducible, and so no secret. A device draws its own."""
    text = "\0".join(["key", str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return hashlib.sha256(text.encode()).digest()


def work_seed(seed: int, *, site: str, kind: str, round: int) -> int:
    """The seed of one client's work in one round, the same in simulation and deployment.

    A gradient's batches come from one permutation per epoch, so its seed does not depend on the round.
    """
    return derive_seed(seed, kind, site) if kind == "gradient" else derive_seed(seed, kind, site, round)
