"""Correlated noise for clients that rest between their turns: a banded matrix mechanism.

The noise of a round takes away part of what earlier rounds have added, so that the sum over rounds, which is
the model, carries less of it than under independent noise. The factor C is the square root of the prefix-sum
matrix cut to `bands` diagonals (Kalinin and Lampert 2024, "Banded square root matrix factorization for
differentially private model training"), its columns scaled to norm 1. Where a client's turns are `bands` rounds
apart or more, the columns that it touches do not overlap, so a client that takes part k times is protected as by
k independent Gaussian releases (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", theorem 2).

Rounds that begin without the noise of those before them, as after a crash, are a further block of C: its
columns do not overlap with earlier ones either, and none is longer. So noise never has to be kept on a disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedge.vector import Array


@lru_cache(maxsize=64)
def coefficients(bands: int) -> tuple[float, ...]:
    """The first column of C from its diagonal down: `bands` numbers, decreasing, of L2 norm 1."""
    if bands < 1:
        raise ValueError(f"bands: expected 1 or more, found {bands}")
    column = [1.0]
    for at in range(1, bands):  # of 1 / sqrt(1 - x): binomial(2 at, at) / 4^at
        column.append(column[-1] * (2 * at - 1) / (2 * at))
    norm = math.sqrt(math.fsum(value * value for value in column))
    return tuple(value / norm for value in column)


def correlate(fresh: Array, recent: Sequence[Array], bands: int) -> Array:
    """A round's noise from independent noise and the noise of rounds before, the newest first.

    `fresh` float32[n] becomes the result: row t of C^-1 z, by forward substitution,
    x_t = (z_t - sum_j c_j x_(t-j)) / c_0. At most `bands - 1` of `recent` count.
    """
    diagonal, *below = coefficients(bands)
    for factor, earlier in zip(below, recent, strict=False):
        fresh -= np.float32(factor) * earlier
    fresh *= np.float32(1 / diagonal)
    return fresh
