"""Skellam noise, exact to 2^-128: the difference of two Poisson variables, drawn by inverting its distribution.

Sums of Skellam variables are Skellam, so that the shares of many sites add up to noise that is known exactly
(Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning"). Integers
have no low-order bits that could tell noise and value apart.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedge.privacy.secure import SecureSource

MAX_VARIANCE = 2.0**30
"""A table reaches about 14 deviations to both sides: here half a million of each."""

_BITS = 128
_PART = 1 << 16
"""Elements drawn at once."""

_DIGITS = 60
_DEVIATIONS = 14
"""Beyond them, and 90 more steps where the variance is small, a Skellam variable has less than 2^-128 of its mass."""

Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SkellamSampler:
    """Draws from Skellam(variance / 2, variance / 2). `of` makes it.

    `cumulative[i]` is P(X <= i - reach) in units of 2^-128, rounded down; `leading` its upper 64 bits.
    """

    variance: float
    reach: int
    cumulative: tuple[int, ...]
    leading: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, variance: float) -> SkellamSampler:
        """The sampler of this variance; the last few are remembered.

        Raises:
            ValueError: the variance is not above 0, or more than 2^30.
        """
        if not 0 < variance <= MAX_VARIANCE:
            raise ValueError(f"variance: expected a number above 0, at most 2^30, found {variance}")
        return _sampler(float(variance))

    def sample(self, source: SecureSource, size: int) -> Whole:
        """`size` independent draws, int64[size]."""
        out: Whole = np.empty(size, np.int64)
        for start in range(0, size, _PART):
            part = out[start : start + _PART]
            words = source.uint64(len(part))
            places = np.searchsorted(self.leading, words, side="right")
            # Where a word equals the upper half of a step of the distribution, its lower half decides.
            for at in np.flatnonzero(self.leading[np.maximum(places, 1) - 1] == words):
                low = int(source.uint64(1)[0])
                places[at] = bisect_right(self.cumulative, (int(words[at]) << 64) | low)
            np.minimum(places, 2 * self.reach, out=places)
            part[:] = places - self.reach
        return out


@lru_cache(maxsize=2)  # the table of the largest variance takes megabytes
def _sampler(variance: float) -> SkellamSampler:
    reach = int(_DEVIATIONS * variance**0.5) + 90
    masses = _masses(variance, reach)
    cumulative, total = [], Decimal(0)
    with localcontext(Context(prec=_DIGITS)):
        unit = Decimal(2) ** _BITS
        for at in range(-reach, reach + 1):
            total += masses[abs(at)]
            cumulative.append(min(int(total * unit), (1 << _BITS) - 1))
    leading = np.array([value >> 64 for value in cumulative], np.uint64)
    return SkellamSampler(variance, reach, tuple(cumulative), leading)


def _masses(variance: float, reach: int) -> list[Decimal]:
    """P(X = k) for k = 0 .. reach, to about 50 digits.

    They are e^-v I_k(v), and modified Bessel functions obey I_(k-1)(v) = I_(k+1)(v) + (2 k / v) I_k(v). Run
    downwards from far out, that recursion forgets where it began (Miller 1952), and it is scaled by what all
    of them sum up to, which is 1: nothing has to be exponentiated.
    """
    begin = reach + 60
    with localcontext(Context(prec=_DIGITS + 10, Emin=-(10**9), Emax=10**9)):
        v = Decimal(variance)
        ratios = [Decimal(0)] * (begin + 2)
        ratios[begin] = Decimal(1)
        for k in range(begin, 0, -1):
            ratios[k - 1] = ratios[k + 1] + 2 * k * ratios[k] / v
        whole = ratios[0] + 2 * sum(ratios[1:], Decimal(0))
        return [ratio / whole for ratio in ratios[: reach + 1]]
