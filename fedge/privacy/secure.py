"""Randomness for noise and for the choice of examples: a keystream, and what is drawn from it.

The key is an argument; who has entropy (a site's worker, a coordinator) makes it there. Not for
simulation's own choices, which use `numpy.random.Generator`: the two types do not mix.

What this is not: exact. `add_gaussian` works in float32, whose numbers are a lattice that depends on how large
they are (Mironov 2012). So it smears its own lattice, and puts what comes out on one grid, whatever went in;
the sum of what is protected has float32's rounding before any noise is there. Where that matters use noise on the
integer grid from the start (`fedge.privacy.skellam`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedge.vector import Array

KEY_BYTES = 32
_BLOCK_BYTES = 16
_PART = 1 << 13
"""Elements drawn at once: what they pass through stays in the cache."""

_GRID_BITS = 14
_ROUNDING = 2.0**-20
"""More than what rounding can take from a product of float32 numbers."""

_MIN_DEVIATION = 2.0**-96
_MAX_DEVIATION = float(np.finfo(np.float32).max) / 8
"""So that a deviation times the largest radius is finite."""

_TAIL = np.uint32(1 << 12)
"""Words below it, one in a million, are refined by another: the largest radii come from the smallest words."""

_UNIT = np.float32(2.0**-32)
_TURN = np.float32(2 * np.pi * 2.0**-32)


class SecureSource:
    """AES-256 in counter mode under a secret key of 32 bytes, never rewound.

    **Guarantees.** The key is in no attribute that can be read back, no repr and no error. Two sources of
    one key give the same words: a key serves one source, and a source one process (a fork repeats it).

    Raises:
        ValueError: the key is not of 32 bytes.
    """

    __slots__ = ("_stream",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"expected a key of {KEY_BYTES} bytes, found {len(key)}")
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()

    def __repr__(self) -> str:
        return "SecureSource()"

    def uint32(self, count: int) -> npt.NDArray[np.uint32]:
        """`count` uniform words, uint32[count], read-only."""
        return np.frombuffer(self._stream.update(bytes(4 * count)), np.dtype("<u4")).astype(
            np.uint32, copy=False
        )

    def uint64(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` uniform words, uint64[count], read-only."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), np.dtype("<u8")).astype(
            np.uint64, copy=False
        )

    def poisson_sample(self, size: int, rate: float) -> npt.NDArray[np.int64]:
        """The members of 0..size-1 that are in a Poisson sample: each by itself, with probability `rate`.

        The probability is `rate` rounded down to a multiple of 2^-64. Returns int64[n], ascending; n may
        be 0.

        Raises:
            ValueError: `rate` is not in (0, 1], or `size` is below 0.
        """
        if size < 0:
            raise ValueError(f"size: expected 0 or more, found {size}")
        if not 0 < rate <= 1:
            raise ValueError(f"sampling_rate: expected a number above 0 and at most 1, found {rate}")
        if rate == 1:
            return np.arange(size, dtype=np.int64)
        threshold = np.uint64(int(rate * 2.0**64))
        return np.flatnonzero(self.uint64(size) < threshold)

    def add_gaussian(self, vector: Array, deviation: float) -> None:
        """Add independent Gaussian noise of this standard deviation to `vector` (float32[n]) in place.

        Box and Muller 1958: a radius from one word (the largest ones from 96 bits) and an angle from another.
        Radii end at 11.59 deviations, beyond which there is 2^-97 of the mass: what a release cannot reach adds
        less to delta than anybody asks for.

        Of words of 32 bits somebody could tell whether a number is one that they can make, and so whether anything
        was added to it. A uniform number in [-1, 1] / 32 deviations on top has no such gaps, and the sum is
        rounded to a multiple of 2^-14 deviations (to the power of two below): both only add to the noise, less
        than 2 in 10,000 to its deviation. 0 adds nothing.

        Raises:
            ValueError: `deviation` is below 0, not finite, too small (2^-96) or too large for float32; or
                `vector` is not one-dimensional float32. Nothing was added.
        """
        if deviation != 0 and not _MIN_DEVIATION <= deviation <= _MAX_DEVIATION:
            raise ValueError(
                f"deviation: expected 0, or a number from {_MIN_DEVIATION:.2g} to {_MAX_DEVIATION:.2g}, found "
                f"{deviation}"
            )
        if vector.dtype != np.float32 or vector.ndim != 1:
            raise ValueError(f"expected a float32 vector to add noise to, found {vector.dtype}{vector.shape}")
        if deviation == 0:
            return
        step = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
        scale = np.float32(deviation / step * (1 + _ROUNDING))  # in steps of the grid
        half = len(vector) // 2 + len(vector) % 2
        for start in range(0, half, _PART):
            first = vector[start : min(start + _PART, half)]
            second = vector[half + start : half + start + len(first)]
            count = len(first)
            words = self.uint32(3 * count)
            radius, angle = self._radii(words[:count], scale), words[count : 2 * count].astype(np.float32)
            angle *= _TURN
            uniform = words[2 * count :].view(np.uint16)
            _add_on_grid(first, np.cos(angle), radius, uniform[:count], scale, step)
            _add_on_grid(second, np.sin(angle, out=angle), radius, uniform[count:], scale, step)

    def _radii(self, words: npt.NDArray[np.uint32], scale: np.float32) -> Array:
        radius = words.astype(np.float32)
        radius += np.float32(0.5)  # so that the logarithm is finite
        tail = np.flatnonzero(words < _TAIL)
        if len(tail):
            radius[tail] = words[tail] + (self.uint64(len(tail)) + 0.5) * 2.0**-64
        radius *= _UNIT
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        radius *= scale
        return radius


def _add_on_grid(
    part: Array,
    direction: Array,
    radius: Array,
    uniform: npt.NDArray[np.uint16],
    scale: np.float32,
    step: float,
) -> None:
    """Round `part` plus noise to multiples of `step`; all but `part` is in steps. Each is float32[n] or longer."""
    count = len(part)
    noise = direction[:count]
    noise *= radius[:count]
    smear = uniform[:count].astype(np.float32)
    smear -= np.float32(32767.5)
    smear *= scale * np.float32(2.0**-20)
    noise += smear
    part *= np.float32(1 / step)  # a power of two: exact
    part += noise
    np.rint(part, out=part)
    part *= np.float32(step)
