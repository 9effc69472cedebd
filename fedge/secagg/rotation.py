"""A random rotation of long vectors, the same for everybody: it spreads what is large evenly over all elements.

A randomised Hadamard transform is of a length that is a power of two. Others are covered by two of them that overlap,
on the first elements and on the last, so that nothing is padded and nothing more has to be sent. Each is random
signs, then an orthonormal transform; so is their product, and no norm changes but by float32's rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedge.vector import Array

SEED_BYTES = 32
_RADIX_BITS = 5


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of vectors of `size` elements that follows from a seed of 32 bytes, which is no secret."""

    size: int
    seed: bytes

    @property
    def span(self) -> int:
        """The length of each transform: the largest power of two in `size`."""
        return 1 << (self.size.bit_length() - 1)

    def apply(self, vector: Array) -> Array:
        """float32[size] -> float32[size]."""
        out = vector.astype(np.float32)
        for at, part in enumerate(self._parts()):
            piece = out[part]
            self._flip(piece, at)
            _transform(piece)
        return out

    def undo(self, vector: Array) -> Array:
        """What `apply` was given, or the sum of what it was given several times."""
        out = vector.astype(np.float32)
        for at, part in reversed(list(enumerate(self._parts()))):
            piece = out[part]
            _transform(piece)
            self._flip(piece, at)
        return out

    def largest(self, norm: float) -> float:
        """What an element of a rotated vector of this norm exceeds with a probability below 2^-20, for all of them
        together: an element is a sum of others with random signs, so Hoeffding's bound holds."""
        return norm * math.sqrt(2 * math.log(2 * self.size * 2.0**20) / self.span)

    def _parts(self) -> list[slice]:
        first, last = slice(0, self.span), slice(self.size - self.span, self.size)
        return [first] if self.span == self.size else [first, last]

    def _flip(self, piece: Array, at: int) -> None:
        counter = (at << 64).to_bytes(16, "big")
        stream = Cipher(algorithms.AES256(self.seed), modes.CTR(counter)).encryptor()
        bits = np.unpackbits(
            np.frombuffer(stream.update(bytes(-(-len(piece) // 8))), np.uint8), count=len(piece)
        )
        np.negative(piece, out=piece, where=bits.view(bool))


def _transform(piece: Array) -> None:
    """The orthonormal Walsh-Hadamard transform of float32[2^k], in place: it is its own inverse."""
    bits = len(piece).bit_length() - 1
    inner = 1
    for start in range(0, bits, _RADIX_BITS):
        radix = 1 << min(_RADIX_BITS, bits - start)
        view = piece.reshape(-1, radix, inner)
        view[...] = np.matmul(_hadamard(radix), view)
        inner *= radix


@lru_cache(maxsize=_RADIX_BITS + 1)
def _hadamard(size: int) -> Array:
    """The orthonormal Hadamard matrix, float32[size, size]."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(size)).astype(np.float32)
