"""Sums of float32 vectors in plain float64, and where nothing of them was rounded: nearly everywhere, at the speed of a
matrix product. What they cannot be sure of is left to the expansions of `fedge.exact`.

A float32 with the biased exponent e is a whole multiple of 2^(e-150), the last place of its 24 bits, and less than
2^(e-126). So with weights of the sum W <= 2^k, where the largest magnitude of an element's terms has the exponent E
and the smallest that is not zero e, every partial sum is a whole multiple of 2^(e-150) and less than 2^(E+k-126):
a float64, whose significand has 53 bits, if E - e <= 29 - k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.vector import Array

MANTISSA_BITS: Final = 23
"""Of a float32, below its exponent."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LAST_PLACE = np.uint32(1)

Double = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint32]
Matrix = npt.NDArray[np.float32]


def exponents_apart(total_weight: int) -> int:
    """By how much the exponents of an element's terms may differ: their sum with these weights is exact in float64,
    in any order. Below zero, only a sum of nothing but zeros is."""
    return 29 - (int(total_weight) - 1).bit_length()  # numpy's integers have no bit_length


class Columns:
    """Room to sum the columns of matrices of up to `terms` rows and `width` columns."""

    def __init__(self, terms: int, width: int) -> None:
        self._values = np.empty((terms, width))
        self._bits = np.empty((terms, width), np.uint32)
        self._sum = np.empty(width)
        self._largest, self._smallest = np.empty(width, np.uint32), np.empty(width, np.uint32)

    def sum(self, rows: Matrix, weights: Double, apart: int) -> tuple[Double, npt.NDArray[np.bool_]]:
        """The weighted sums of the columns of float32[terms, columns], and which of them are exact; the former until
        the next call."""
        count, columns = rows.shape
        values, bits = self._values[:count, :columns], self._bits[:count, :columns]
        total, largest, smallest = self._sum[:columns], self._largest[:columns], self._smallest[:columns]
        # As whole numbers, floats without their signs are in the order of the floats.
        np.bitwise_and(rows.view(np.uint32), _MAGNITUDE, out=bits)
        np.maximum.reduce(bits, axis=0, out=largest)
        np.subtract(bits, _LAST_PLACE, out=bits)
        np.minimum.reduce(bits, axis=0, out=smallest)
        values[:] = rows
        np.matmul(weights, values, out=total)
        return total, _are_exact(largest, smallest, apart)


class Rows:
    """Room to sum up to `width` elements of one vector after another: for long ones, which a matrix would copy."""

    def __init__(self, width: int) -> None:
        self._sum, self._product = np.empty(width), np.empty(width)
        self._bits, self._largest, self._smallest = (np.empty(width, np.uint32) for _ in range(3))

    def sum(
        self, vectors: Iterable[Array], weights: Sequence[int], apart: int
    ) -> tuple[Double, npt.NDArray[np.bool_]]:
        """As `Columns.sum`, of float32 vectors of one size."""
        alike = len({*weights}) == 1  # what they have in common is as exact at the end
        its = list(zip(vectors, weights, strict=True))
        size = len(its[0][0])
        total, product = self._sum[:size], self._product[:size]
        bits, largest, smallest = self._bits[:size], self._largest[:size], self._smallest[:size]
        total[:], largest[:], smallest[:] = 0.0, 0, ~np.uint32(0)
        for values, weight in its:  # once over each, while it is in the cache
            np.bitwise_and(values.view(np.uint32), _MAGNITUDE, out=bits)
            np.maximum(largest, bits, out=largest)
            np.subtract(bits, _LAST_PLACE, out=bits)
            np.minimum(smallest, bits, out=smallest)
            product[:] = values
            if not alike:
                product *= weight
            total += product
        if alike:
            total *= weights[0]
        return total, _are_exact(largest, smallest, apart)


def _are_exact(largest: Bits, smallest: Bits, apart: int) -> npt.NDArray[np.bool_]:
    """Whether exponents are at most so far apart; by the bits of the largest magnitudes, and of the smallest after one
    was taken from each: zero less one is the last of all whole numbers. Overwrites both."""
    if apart < 0:
        exact: npt.NDArray[np.bool_] = largest == 0
        return exact
    np.add(smallest, _LAST_PLACE, out=smallest)
    np.subtract(largest, smallest, out=largest)
    return largest <= np.uint32(apart << MANTISSA_BITS)
