"""Reductions that a few hostile updates cannot move far: they look at all updates, coordinate by coordinate.

Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates", definitions 1 and 2. Every
update counts the same: what it says it weighs is a claim. They need each update for itself, so that there is none of
this under secure aggregation, and the updates of a round are kept until it closes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedge.exact import MAX_WEIGHT
from fedge.parallel import in_shares
from fedge.pipeline import Aggregate, Mean, MeanState, Update
from fedge.vector import Array

_BLOCK_BYTES = 1 << 22
"""Of all updates together, at once, for each thread."""

_NO_VECTOR: Array = np.zeros(0, np.float32)

Middle = npt.NDArray[np.float64]


class _Coordinatewise:
    """What both have in common: they keep the updates, and combine the elements at each place."""

    __slots__ = ()
    streams: ClassVar[bool] = False

    def start(self, size: int) -> MeanState:
        return MeanState(None, size=size)

    def fold(self, state: MeanState, *updates: Update) -> MeanState:
        """`(state, updates) -> state`. The updates' vectors have to stay as they are until the end.

        Raises:
            ValueError: a number of examples is not in [1, 2^29), or a vector not of the right size; nothing was folded.
        """
        return _folded(state, updates)

    def finish(self, state: MeanState, *updates: Update) -> Aggregate:
        """The aggregate; metrics are plain means.

        Raises:
            ValueError: there are no updates at all, or one is as `fold` does not accept it.
        """
        return _finish(state, updates, self._middle)

    def _middle(self, rows: Array) -> Middle:
        """float32[updates, n] -> float64[n]."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class CoordinateMedian(_Coordinatewise):
    """Each element is the median of the updates' elements; of an even number the mean of the middle two.

    **Guarantees.** While fewer than half of the updates are hostile, every element lies between two honest ones. The
    result does not depend on the order in which updates are folded, to the bit.
    """

    def _middle(self, rows: Array) -> Middle:
        middle = len(rows) // 2
        if len(rows) % 2:
            out: Middle = np.partition(rows, middle, axis=0)[middle].astype(np.float64)
            return out
        two = np.partition(rows, (middle - 1, middle), axis=0)[middle - 1 : middle + 1].astype(np.float64)
        between: Middle = two[0] / 2 + two[1] / 2
        return between


@dataclass(frozen=True, slots=True)
class TrimmedMean(_Coordinatewise):
    """Each element is the mean of the updates' elements without the `trim` largest and the `trim` smallest of them: of
    n updates floor(trim * n) at each end.

    **Guarantees.** While no more updates than that are hostile, every element lies between two honest ones. The result
    does not depend on the order in which updates are folded, to the bit.

    Raises:
        ValueError: `trim` is not in [0, 0.5).
    """

    trim: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim: expected a share of at least 0 and below one half, found {self.trim}")

    def _middle(self, rows: Array) -> Middle:
        out = int(self.trim * len(rows) + 1e-9)  # 0.1 * 30 is meant to be 3
        kept = np.sort(rows, axis=0)[out : len(rows) - out].astype(np.float64)
        # About the smallest: of equal elements the mean is that element, whatever rounding does to sums.
        mean: Middle = kept[0] + (kept - kept[0]).sum(0) / len(kept)
        return mean


def _folded(state: MeanState, updates: Sequence[Update]) -> MeanState:
    for update in updates:
        if not 1 <= update.num_examples < MAX_WEIGHT:
            raise ValueError(f"expected num_examples in [1, {MAX_WEIGHT}), found {update.num_examples}")
        if len(update.vector) != state.size:
            raise ValueError(f"expected a vector of {state.size} elements, found {len(update.vector)}")
    return replace(state, updates=(*state.updates, *updates))


def _finish(state: MeanState, updates: Sequence[Update], middle: Callable[[Array], Middle]) -> Aggregate:
    everything, size = _folded(state, updates).updates, state.size
    counts = Mean("uniform")
    counted = counts.finish(counts.start(0), *(replace(each, vector=_NO_VECTOR) for each in everything))
    out: Array = np.empty(size, np.float32)
    block = max(1, _BLOCK_BYTES // (4 * len(everything)))

    def share(numbers: range) -> None:
        for number in numbers:
            part = slice(number * block, min((number + 1) * block, size))
            rows = np.stack([update.vector[part] for update in everything])
            out[part] = middle(rows)

    in_shares(share, blocks=-(-size // block), elements=size * len(everything))
    return replace(counted, vector=out)
