"""Whole numbers modulo 2^bits: what masked vectors are made of.

They are held in the smallest unsigned type that has the bits, whose own overflow is the reduction: taking the low
bits of a sum gives the sum of the low bits. On the wire they are packed, so that 12 bits cost 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[Any]
"""An array of one of the ring's unsigned types."""

Whole = npt.NDArray[np.int64]

_GROUP = 1 << 16
"""Elements packed at once; a multiple of eight, so that each group ends with a whole byte."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The integers modulo 2^`bits`, for 8 to 32 bits, or 64.

    Raises:
        ValueError: another number of bits.
    """

    bits: int

    def __post_init__(self) -> None:
        if not (8 <= self.bits <= 32 or self.bits == 64):
            raise ValueError(f"bits: expected 8 to 32, or 64, found {self.bits}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The little-endian unsigned type that elements are held in."""
        width = next(width for width in (8, 16, 32, 64) if self.bits <= width)
        return np.dtype(f"<u{width // 8}")

    @property
    def modulus(self) -> int:
        return 1 << self.bits

    def zeros(self, size: int) -> Words:
        return np.zeros(size, self.dtype)

    def of(self, values: Whole) -> Words:
        """Each whole number modulo 2^bits (or a multiple of that): int64[n] -> words[n]."""
        return values.astype(self.dtype)

    def signed(self, words: Words) -> Whole:
        """The numbers of least size that these stand for, from -2^(bits - 1) on: words[n] -> int64[n]."""
        shift = 8 * self.dtype.itemsize - self.bits
        signed: npt.NDArray[Any] = (words << self.dtype.type(shift)).view(f"<i{self.dtype.itemsize}")
        return (signed >> shift).astype(np.int64)

    def packed_bytes(self, size: int) -> int:
        """Bytes on the wire of so many elements."""
        return (size * self.bits + 7) // 8

    def pack(self, words: Words) -> bytes:
        """The low bits of each element, one after the other, lowest first: words[n] -> packed_bytes(n) bytes."""
        if self.bits == 8 * self.dtype.itemsize:
            return words.tobytes()
        return b"".join(
            np.packbits(self._bits_of(words[start : start + _GROUP]), bitorder="little").tobytes()
            for start in range(0, len(words), _GROUP)
        )

    def unpack(self, data: bytes | memoryview, size: int) -> Words:
        """What `pack` was given, but for bits above the ring's: words[size], which may be a view of `data`.

        Raises:
            ValueError: `data` is not of packed_bytes(size) bytes.
        """
        if len(data) != self.packed_bytes(size):
            raise ValueError(
                f"expected {self.packed_bytes(size)} bytes for {size} elements, found {len(data)}"
            )
        if self.bits == 8 * self.dtype.itemsize:
            return np.frombuffer(data, self.dtype)
        out = np.empty(size, self.dtype)
        view, step = memoryview(data), _GROUP * self.bits // 8
        for number, start in enumerate(range(0, size, _GROUP)):
            part = out[start : start + _GROUP]
            part[:] = self._elements_of(view[number * step : (number + 1) * step], len(part))
        return out

    def _elements_of(self, packed: memoryview, size: int) -> Words:
        """Eight elements are in `bits` bytes: the first, second ... of each eight are read as words that far apart."""
        eights = -(-size // 8)
        padded = np.zeros(eights * self.bits + 8, np.uint8)
        padded[: len(packed)] = np.frombuffer(packed, np.uint8)
        out = np.empty((eights, 8), self.dtype)
        for at in range(8):
            offset, shift = divmod(at * self.bits, 8)
            words: npt.NDArray[np.uint64] = np.ndarray(eights, "<u8", padded, offset, (self.bits,))
            out[:, at] = (words >> np.uint64(shift)) & np.uint64(self.modulus - 1)
        return out.reshape(-1)[:size]

    def _bits_of(self, words: Words) -> npt.NDArray[np.uint8]:
        """The low bits of each: words[n] -> uint8[n * bits] of zeros and ones."""
        width = 8 * self.dtype.itemsize
        rows = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")
        return np.ascontiguousarray(rows.reshape(len(words), width)[:, : self.bits]).reshape(-1)
