"""Updates as vectors of rings, to be masked and added up, and what their sums say.

An update is two vectors: its elements in fixed point, and what rides beside them (`fedge.secagg.tail`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.errors import RunError
from fedge.pipeline import Aggregate
from fedge.privacy.secure import SecureSource
from fedge.secagg.fixed_point import FixedPoint
from fedge.secagg.grid import Grid
from fedge.secagg.ring import Ring, Words
from fedge.secagg.rotation import Rotation
from fedge.secagg.tail import RING, Summary, Tail
from fedge.vector import Array

BEYOND_BOUND: Final = "beyond_bound"
"""A metric that rides in every sum of updates: the share of them, by weight, that were cut to the bound."""


@dataclass(frozen=True, slots=True, eq=False)
class Summed:
    """What a secure sum says: the weighted sum of vectors, float64[size] (empty for an evaluation), and the rest."""

    vector: npt.NDArray[np.float64]
    summary: Summary


def mean_of(sums: Sequence[Summed], clients: Sequence[str], divisor: int | None = None) -> Aggregate:
    """The weighted mean of all that is in these sums, which are of different members: two sums make a mean.

    With a `divisor` the sum is divided by that instead, however many there are (see `fedge.privacy.central`).
    """
    vector, summary = sums[0].vector, sums[0].summary
    for each in sums[1:]:
        vector, summary = vector + each.vector, summary.plus(each.summary)
    mean = (vector / (divisor or summary.weight)).astype(np.float32)
    metrics = {name: value for name, value in summary.means.items() if name != BEYOND_BOUND or value > 0}
    return Aggregate(mean, tuple(sorted(clients)), summary.weight, metrics)


@dataclass(frozen=True, slots=True)
class Encoding:
    """An update of `size` elements as two vectors of rings: its elements, and what rides beside.

    `body` None: it has no elements. On a `Grid` only the first of them are summed, and the rest is zero.
    """

    size: int
    body: FixedPoint | Grid | None
    tail: Tail
    rotation: Rotation | None

    @property
    def rings(self) -> list[tuple[Ring, int]]:
        """The rings, and how many elements each vector has."""
        body = [(self.body.ring, self.body.size)] if self.body is not None else []
        return [*body, (RING, self.tail.size)]

    @property
    def packed_bytes(self) -> int:
        """Bytes of an encoded update on the wire."""
        return sum(ring.packed_bytes(size) for ring, size in self.rings)

    def encode(
        self, vector: Array, weight: int, metrics: Mapping[str, float], source: SecureSource
    ) -> list[Words]:
        """One member's part; `vector` is float32[size], the weight is cut to the largest.

        Raises:
            ValueError: the vector is not finite, or of another size, or not zero where nothing of it is summed, or the
                weight is below 1.
        """
        weight = min(weight, self.tail.max_weight)
        if self.body is None:
            return [self.tail.encode(weight, metrics)]
        if not np.isfinite(vector).all():  # before the rotation, which would make NaN of all of it
            raise ValueError("expected a finite vector to encode, found NaN or infinity in it")
        vector, rest = vector[: self.body.size], vector[self.body.size :]
        if rest.any():
            raise ValueError("expected zeros where no noise is added, found something else")
        rotated = self.rotation.apply(vector) if self.rotation is not None else vector
        if isinstance(self.body, FixedPoint):  # whether a clipped update was cut is nobody's business
            metrics = {**metrics, BEYOND_BOUND: float(self.body.cuts(rotated))}
        return [self.body.encode(rotated, weight, source), self.tail.encode(weight, metrics)]

    def was_cut(self, vectors: Sequence[Words]) -> bool:
        """Whether a part that is not masked yet is of an update that went beyond the bound."""
        value, _ = self.tail.decode(vectors[-1], 1).totals.get(BEYOND_BOUND, (0.0, 0))
        return value > 0

    def zeros(self) -> list[Words]:
        """The sum of nothing."""
        return [ring.zeros(size) for ring, size in self.rings]

    def decode(self, total: Sequence[Words], members: int) -> Summed:
        """What the sum of so many members' parts says.

        Raises:
            RunError: they cannot have made it.
        """
        summary = self.tail.decode(total[-1], members)
        if self.body is None:
            return Summed(np.zeros(0), summary)
        found = self.body.decode(total[0], members)
        if self.rotation is not None:
            found = self.rotation.undo(found.astype(np.float32)).astype(np.float64)
        if not np.isfinite(found).all():
            raise RunError("the secure sum has infinity in it: choose a smaller bound")
        if len(found) < self.size:
            found = np.pad(found, (0, self.size - len(found)))
        return Summed(found, summary)

    def pack(self, vectors: Sequence[Words]) -> bytes:
        """As they are sent, one after the other."""
        return b"".join(ring.pack(words) for (ring, _), words in zip(self.rings, vectors, strict=True))

    def unpack(self, data: bytes | memoryview) -> list[Words]:
        """What `pack` was given.

        Raises:
            ValueError: it is of another length.
        """
        if len(data) != self.packed_bytes:
            raise ValueError(f"expected {self.packed_bytes} bytes, found {len(data)}")
        view, out = memoryview(data), []
        for ring, size in self.rings:
            length = ring.packed_bytes(size)
            out.append(ring.unpack(view[:length], size))
            view = view[length:]
        return out
