"""An exact streaming sum of weighted float32 vectors: the order of arrival cannot change a bit of it.

Each element is held as an expansion, a few float64 numbers whose *exact* sum is the exact sum so far
(Shewchuk 1997, "Adaptive precision floating-point arithmetic", section 2; Knuth's TwoSum). Since the
value held is exact, whatever order the updates came in, and the result is one function of that value,
the result is the same. The first component costs 8 bytes an element; the others are allocated only
for the blocks that need them, which for updates of like magnitude is next to none.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedge.vector import Array

BLOCK = 1 << 15
"""Elements handled at once: temporaries stay in the second-level cache."""

MAX_WEIGHT = 1 << 29
"""A float32 (24 significant bits) times a smaller integer (29 bits) is exact in float64 (53 bits)."""

_SPARSE_SHARE = 8

Double = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]


class ExactSum:
    """The exact sum of `weight * values` over any number of vectors of `size` elements.

    **Guarantees.** `mean` depends only on the multiset of (weight, vector) pairs that was added: it is
    the exact sum rounded once to float64, divided by the total weight, and rounded to float32.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._dense = np.empty(size)  # untouched memory is not resident: nothing is paid before `add`
        self._blocks = [_Block(self._dense[at : at + BLOCK]) for at in range(0, size, BLOCK)]
        self._scratch = tuple(np.empty(min(BLOCK, size)) for _ in range(4))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for components by now."""
        return sum(block.nbytes for block in self._blocks)

    def add(self, values: Array, *, weight: int, offset: int = 0) -> None:
        """Add `weight * values` at `offset`; `values` must be finite.

        A slice covers whole blocks: it starts at a multiple of BLOCK, and ends at one or at the end.

        Raises:
            ValueError: the weight is not in [1, MAX_WEIGHT), or the slice does not fit.
        """
        if not 1 <= weight < MAX_WEIGHT:
            raise ValueError(f"expected a weight in [1, {MAX_WEIGHT}), found {weight}")
        end = offset + len(values)
        if offset < 0 or offset % BLOCK or end > self._size or (end % BLOCK and end != self._size):
            raise ValueError(
                f"expected a slice of {self._size} elements that starts and ends at a multiple of {BLOCK} "
                f"or ends at the end, found [{offset}, {end})"
            )
        for start in range(0, len(values), BLOCK):
            part = values[start : start + BLOCK]
            block = self._blocks[(offset + start) // BLOCK]
            product, *scratch = (buffer[: len(part)] for buffer in self._scratch)
            np.multiply(part, float(weight), out=product, dtype=np.float64)
            block.add(product, scratch)

    def mean(self, total_weight: int) -> Array:
        """The sum divided by `total_weight`, float32[size]. Consumes the sum and reuses its memory."""
        # The result is written over the first half of the components (element i's four bytes lie at or
        # before its own eight, which are read first), then the second half is given back.
        out: Array = self._dense.view(np.float32)[: self._size]
        blocks, self._blocks = self._blocks, []
        blocks.reverse()
        at = 0
        while blocks:
            block = blocks.pop()
            # Adding zero makes -0.0 the zero that an expansion of several components has.
            quotient = (block.rounded() + 0.0) / float(total_weight)
            out[at : at + block.size] = quotient
            at += block.size
        del out
        dense, self._dense = self._dense, np.empty(0)
        dense.resize((self._size + 1) // 2, refcheck=False)  # every view of it is gone
        return dense.view(np.float32)[: self._size]


class _Block:
    """Up to BLOCK elements: a dense component, errors awaiting it sparsely, and the rest below."""

    __slots__ = ("_dense", "_empty", "_low", "_pending", "_pending_count", "size")

    def __init__(self, dense: Double) -> None:
        self.size = len(dense)
        self._dense = dense
        self._empty = True
        self._pending: list[tuple[Index, Double]] = []
        self._pending_count = 0
        self._low: _Block | None = None

    @property
    def nbytes(self) -> int:
        own = 0 if self._empty else self._dense.nbytes
        return own + 16 * self._pending_count + (self._low.nbytes if self._low else 0)

    def add(self, product: Double, scratch: list[Double]) -> None:
        """Add a float64 vector exactly; `product` and `scratch` are overwritten."""
        if self._empty:
            self._dense[:] = product
            self._empty = False
            return
        total, first, second = scratch
        # TwoSum: total + error is exactly dense + product.
        np.add(self._dense, product, out=total)
        np.subtract(total, self._dense, out=first)
        np.subtract(total, first, out=second)
        np.subtract(self._dense, second, out=second)
        np.subtract(product, first, out=first)
        np.add(second, first, out=first)
        self._dense[:] = total
        if first.any():
            where = np.flatnonzero(first)
            self._spill(where, first[where])

    def rounded(self) -> Double:
        """Every element's exact value, rounded to nearest float64."""
        self._settle()
        components: list[Double] = []
        block: _Block | None = self
        while block is not None and not block._empty:
            components.append(block._dense)
            block = block._low
        if not components:
            return np.zeros(self.size)
        if len(components) == 1:
            return components[0]
        # The sum of two doubles is rounded correctly by the addition; more need care, and are rare.
        out = components[0] + components[1]
        deeper = np.zeros(self.size, bool)
        for component in components[2:]:
            deeper |= component != 0
        for at in np.flatnonzero(deeper):
            out[at] = math.fsum(component[at] for component in components)
        return out

    def _spill(self, where: Index, errors: Double) -> None:
        """Keep errors sparsely while they are few; then in a block below, exactly again."""
        if self._low is None and (self._pending_count + len(where)) * _SPARSE_SHARE <= self.size:
            self._pending.append((where, errors))
            self._pending_count += len(where)
            return
        low = self._push_down()
        low._add_at(where, errors)

    def _push_down(self) -> _Block:
        if self._low is None:
            self._low = _Block(np.zeros(self.size))
            self._low._empty = False
        pending, self._pending, self._pending_count = self._pending, [], 0
        for where, errors in pending:
            self._low._add_at(where, errors)
        return self._low

    def _add_at(self, where: Index, values: Double) -> None:
        old = self._dense[where]
        total = old + values
        other = total - old
        error = (old - (total - other)) + (values - other)
        self._dense[where] = total
        if error.any():
            wrong = np.flatnonzero(error)
            self._spill(where[wrong], error[wrong])

    def _settle(self) -> None:
        """Move every pending error into dense blocks below, down to the last."""
        block: _Block | None = self
        while block is not None:
            if block._pending:
                block._push_down()
            block = block._low
