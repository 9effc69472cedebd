"""An exact sum of weighted float32 vectors: the order of arrival cannot change a bit of it.

Each element is held as an expansion, a few float64 numbers whose *exact* sum is the exact sum so far
(Shewchuk 1997, "Adaptive precision floating-point arithmetic", section 2; Knuth's TwoSum). Since the
value held is exact, whatever order the updates came in, and the result is one function of that value,
the result is the same. The first component costs 8 bytes an element; the others are allocated only
for the blocks that need them, which for updates of like magnitude is next to none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedge.parallel import in_shares
from fedge.unrounded import Columns, Double, Matrix, Rows, exponents_apart
from fedge.vector import Array

BLOCK = 1 << 16
"""Elements handled at once: a few temporaries of a block stay in the second-level cache."""

MAX_WEIGHT = 1 << 29
"""A float32 (24 significant bits) times a smaller integer (29 bits) is exact in float64 (53 bits)."""

_SPARSE_SHARE = 8

_MANY = 8
"""Terms from which on a sum of all of them is tried first."""

_SHORT = 1 << 14
"""Elements of a block below which many terms are summed by columns."""

_MATRIX = 1 << 17
"""Numbers of many short terms that are looked at at once: what is made of them, 1.5 MB, stays in a cache."""

_WIDE = 1 << 13
"""Columns of long rows that are looked at at once: of fewer, each row would be read in pieces too short."""

_FEW = 64
"""Long rows up to which they are, so that what is made of them stays in a cache, too."""

Index = npt.NDArray[np.intp]


class Values(Protocol):
    """A float32 vector that may lie elsewhere: an array, or a file that is read a slice at a time.

    Slices are taken on several threads at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Array: ...


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """`weight * values`, for a weight in [1, MAX_WEIGHT) and finite values.

    Raises:
        ValueError: the weight is not in that range.
    """

    values: Values
    weight: int

    def __post_init__(self) -> None:
        if not 1 <= self.weight < MAX_WEIGHT:
            raise ValueError(f"expected a weight in [1, {MAX_WEIGHT}), found {self.weight}")


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """The exact sum of some terms, on its way to others: of `dense` (float64[size]), and of the numbers of `rest` at
    their places, which are those of one block in each pair.
    """

    dense: Double
    rest: tuple[tuple[Index, Double], ...]

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes + sum(where.nbytes + values.nbytes for where, values in self.rest)


class ExactSum:
    """The exact sum of any number of terms of `size` elements.

    **Guarantees.** `mean` depends only on the multiset of terms that was added: it is the exact sum
    rounded once to float64, divided by the total weight, and rounded to float32.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._dense = np.empty(0)
        self._blocks: list[_Block] = []

    @property
    def nbytes(self) -> int:
        """Bytes allocated for components by now."""
        return sum(block.nbytes for block in self._blocks)

    def add(self, *terms: Term) -> None:
        """Add terms; several at once are faster than one after another.

        Raises:
            ValueError: one is not of this sum's size; nothing was added.
        """
        self._check(terms)
        if not terms:
            return
        self._begin()

        def add(blocks: range) -> None:
            room = _Room(min(BLOCK, self._size))
            for number in blocks:
                _add(self._blocks[number], number * BLOCK, terms, room)

        self._in_shares(add)

    def add_partial(self, partial: Partial) -> None:
        """Add the terms of another sum.

        Raises:
            ValueError: it is not of this sum's size; nothing was added.
        """
        if len(partial.dense) != self._size:
            raise ValueError(f"expected a sum of {self._size} elements, found {len(partial.dense)}")
        self._begin()
        room = _Room(min(BLOCK, self._size))
        for number, block in enumerate(self._blocks):
            block.add(partial.dense[number * BLOCK :][: block.size], 1, room)
        for where, values in partial.rest:
            number = int(where[0]) // BLOCK
            self._blocks[number].add_at(where - number * BLOCK, values)

    def partial(self) -> Partial:
        """What was added. Consumes the sum."""
        blocks, self._blocks = self._blocks, []
        dense, self._dense = self._dense, np.empty(0)
        rest = [
            (where + number * BLOCK, values)
            for number, block in enumerate(blocks)
            for where, values in block.rest()
        ]
        return Partial(dense if blocks else np.zeros(self._size), tuple(rest))

    def mean(self, total_weight: int, *terms: Term) -> Array:
        """The sum, with these terms added, divided by `total_weight`: float32[size]. Consumes the sum.

        What was added before gives its memory to the result; the last terms need none beside it.

        Raises:
            ValueError: a term is not of this sum's size.
        """
        self._check(terms)
        blocks, self._blocks = self._blocks, []
        dense, self._dense = self._dense, np.empty(0)
        if not blocks:
            out: Array = np.empty(self._size, np.float32)
            self._in_shares(lambda numbers: self._fresh_means(numbers, terms, total_weight, out))
            return out
        self._replace_by_means(dense.view(np.float32), blocks, terms, total_weight)
        blocks.clear()
        dense.resize((self._size + 1) // 2, refcheck=False)  # every view of it is gone
        return dense.view(np.float32)[: self._size]

    def _replace_by_means(
        self, halves: Array, blocks: list[_Block], terms: Sequence[Term], total_weight: int
    ) -> None:
        """Write the means over the first half of the components, which are seen as `halves`.

        Each thread writes over the first half of its own: element i's four bytes lie at or before its
        own eight, which are read first. Then the results close up.
        """
        shares = self._in_shares(
            lambda numbers: self._means_in_place(numbers, blocks, terms, total_weight, halves)
        )
        for numbers in shares:
            first, end = numbers.start * BLOCK, min(numbers.stop * BLOCK, self._size)
            halves[first:end] = halves[2 * first : first + end]

    def _means_in_place(
        self, numbers: range, blocks: list[_Block], terms: Sequence[Term], total_weight: int, halves: Array
    ) -> None:
        room = _Room(min(BLOCK, self._size))
        at = 2 * numbers.start * BLOCK
        for number in numbers:
            block = blocks[number]
            _add(block, number * BLOCK, terms, room)
            halves[at : at + block.size] = _quotient(block.rounded(), total_weight)
            at += block.size

    def _fresh_means(self, numbers: range, terms: Sequence[Term], total_weight: int, out: Array) -> None:
        room, memory = _Room(min(BLOCK, self._size)), np.empty(min(BLOCK, self._size))
        for number in numbers:
            part = out[number * BLOCK : (number + 1) * BLOCK]
            block = _Block(memory[: len(part)])
            _add(block, number * BLOCK, terms, room)
            part[:] = _quotient(block.rounded(), total_weight)

    def _begin(self) -> None:
        """There is something to add."""
        if not self._blocks:
            self._dense = np.empty(self._size)
            self._blocks = [_Block(self._dense[at : at + BLOCK]) for at in range(0, self._size, BLOCK)]

    def _check(self, terms: Sequence[Term]) -> None:
        for term in terms:
            if len(term.values) != self._size:
                raise ValueError(f"expected a vector of {self._size} elements, found {len(term.values)}")

    def _in_shares(self, function: Callable[[range], None]) -> list[range]:
        """Call it with shares of the blocks' numbers, on threads if they are large; returns the shares."""
        return in_shares(function, blocks=-(-self._size // BLOCK), elements=self._size)


def mean_of_rows(rows: Matrix, weights: Sequence[int]) -> Array:
    """What `ExactSum.mean` makes of these alone, float32[size], of float32[terms, size]: faster.

    Raises:
        ValueError: a weight is not in [1, MAX_WEIGHT), or there is not one for each.
    """
    count, size = rows.shape
    total_weight = sum(weights)
    if len(weights) != count or not all(1 <= weight < MAX_WEIGHT for weight in weights):
        raise ValueError(f"expected {count} weights in [1, {MAX_WEIGHT}), found {len(weights)}, or others")
    width = _width(count, size) if count >= _MANY else 0
    if not width:
        return _mean_of_terms(rows, weights)
    factors, apart = np.array(weights, np.float64), exponents_apart(total_weight)
    mean, doubtful = np.empty(size, np.float32), list[Index]()

    def sum_parts(numbers: range) -> None:
        columns = Columns(count, width)
        for start in range(numbers.start * width, numbers.stop * width, width):
            part = slice(start, start + width)
            total, exact = columns.sum(rows[:, part], factors, apart)
            mean[part] = _quotient(total, total_weight)
            if not exact.all():
                doubtful.append(start + np.flatnonzero(~exact))

    in_shares(sum_parts, blocks=-(-size // width), elements=size)
    if not doubtful:
        return mean
    where = np.concatenate(doubtful)
    if len(where) * _SPARSE_SHARE > size:
        return _mean_of_terms(rows, weights)
    products = rows[:, where] * factors[:, None]  # each is exact
    mean[where] = _quotient(np.array([math.fsum(column) for column in products.T.tolist()]), total_weight)
    return mean


def _width(count: int, size: int) -> int:
    """Of the matrices that sum so many rows of this size; 0 if none would be faster than one row after another."""
    if size <= _SHORT:
        return max(1, min(size, _MATRIX // count))
    return _WIDE if count <= _FEW else 0


def _mean_of_terms(rows: Matrix, weights: Sequence[int]) -> Array:
    terms = [Term(row, weight) for row, weight in zip(rows, weights, strict=True)]
    return ExactSum(rows.shape[1]).mean(sum(weights), *terms)


class _Room:
    """A thread's temporaries."""

    def __init__(self, size: int) -> None:
        self.product, self.total, self.given_back = (np.empty(size) for _ in range(3))
        self.inexact, self.inexact_too = np.empty(size, bool), np.empty(size, bool)
        self.rows = Rows(size)


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

    def add(self, values: Array | Double, weight: int, room: _Room) -> None:
        """Add `weight * values` exactly."""
        product = self._dense if self._empty else room.product[: self.size]
        product[:] = values
        if weight != 1:
            product *= weight
        if self._empty:
            self._empty = False
            return
        total, given_back = room.total[: self.size], room.given_back[: self.size]
        inexact, inexact_too = room.inexact[: self.size], room.inexact_too[: self.size]
        # Where `total` is exact, subtracting either summand gives back the other; where it is not,
        # subtracting the larger is itself exact (Dekker 1971, FastTwoSum) and so does not.
        np.add(self._dense, product, out=total)
        np.not_equal(np.subtract(total, self._dense, out=given_back), product, out=inexact)
        np.not_equal(np.subtract(total, product, out=given_back), self._dense, out=inexact_too)
        inexact |= inexact_too
        if inexact.any():
            where = np.flatnonzero(inexact)
            self._spill(where, _error(self._dense[where], product[where]))
        self._dense[:] = total

    def rest(self) -> Iterator[tuple[Index, Double]]:
        """What is not in the dense component: numbers, and their places."""
        yield from self._pending
        if self._low is not None:
            where = np.flatnonzero(self._low._dense)
            if len(where):
                yield where, self._low._dense[where]
            yield from self._low.rest()

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
        low.add_at(where, errors)

    def _push_down(self) -> _Block:
        if self._low is None:
            self._low = _Block(np.zeros(self.size))
            self._low._empty = False
        pending, self._pending, self._pending_count = self._pending, [], 0
        for where, errors in pending:
            self._low.add_at(where, errors)
        return self._low

    def add_at(self, where: Index, values: Double) -> None:
        """Add numbers at a few places, exactly; something was added before."""
        old = self._dense[where]
        error = _error(old, values)
        self._dense[where] = old + values
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


def _add(block: _Block, offset: int, terms: Sequence[Term], room: _Room) -> None:
    if len(terms) >= _MANY and all(isinstance(term.values, np.ndarray) for term in terms):
        _add_many(block, offset, terms, room)
        return
    for term in terms:
        block.add(term.values[offset : offset + block.size], term.weight, room)


def _add_many(block: _Block, offset: int, terms: Sequence[Term], room: _Room) -> None:
    """As one after the other: by plain float64 sums where these are exact, as they nearly always are."""
    weights = [term.weight for term in terms]
    apart = exponents_apart(sum(weights))
    if block.size <= _SHORT:
        total, exact = _sum_of_columns(offset, block.size, terms, weights, apart)
    else:
        vectors = (term.values[offset : offset + block.size] for term in terms)
        total, exact = room.rows.sum(vectors, weights, apart)
    where = np.flatnonzero(~exact)
    if len(where) * _SPARSE_SHARE > block.size:
        for term in terms:
            block.add(term.values[offset : offset + block.size], term.weight, room)
        return
    total[where] = 0.0
    block.add(total, 1, room)
    if len(where):
        few = [term.values[offset : offset + block.size][where] for term in terms]
        for part in _expansion(np.stack(few).astype(np.float64) * np.array(weights, np.float64)[:, None]):
            block.add_at(where, part)


def _sum_of_columns(
    offset: int, size: int, terms: Sequence[Term], weights: Sequence[int], apart: int
) -> tuple[Double, npt.NDArray[np.bool_]]:
    """As `Rows.sum`, a matrix of many terms' elements at a time: for short vectors, of which each call would do
    little."""
    total, exact, factors = np.empty(size), np.empty(size, bool), np.array(weights, np.float64)
    width = _width(len(terms), size)
    columns = Columns(len(terms), width)
    for start in range(0, size, width):
        part = slice(start, min(start + width, size))
        values = np.stack([term.values[offset + part.start : offset + part.stop] for term in terms])
        total[part], exact[part] = columns.sum(values, factors, apart)
    return total, exact


def _expansion(products: Double) -> Iterator[Double]:
    """Vectors float64[columns] whose exact sum is that of the columns of [terms, columns], the largest first."""
    columns = products.T.tolist()
    while any(sums := [math.fsum(column) for column in columns]):
        yield np.array(sums)
        for column, part in zip(columns, sums, strict=True):
            column.append(-part)


def _quotient(total: Double, total_weight: int) -> Double:
    """In place."""
    total += 0.0  # makes -0.0 the zero that an expansion of several components has
    total /= float(total_weight)
    return total


def _error(left: Double, right: Double) -> Double:
    """What rounding `left + right` loses: the second half of TwoSum."""
    total = left + right
    other = total - left
    error: Double = (left - (total - other)) + (right - other)
    return error
