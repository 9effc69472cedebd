"""What rides beside the vector in a secure sum, in 64 bits each: how many took part, their weight, their metrics.

A metric is two numbers, its weighted value and the weight that it was reported with, so that its mean is over those
who report it. Which metrics there are is agreed before; their values are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedge.errors import RunError
from fedge.secagg.ring import Ring, Words

RING: Final = Ring(64)
BOUND: Final = 2.0**20
"""Metrics are cut to this absolute value: losses are logarithms, and the others shares, as a rule."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The sums over members: of ones, of weights, and for each metric of weighted values and of the weights that it
    was reported with."""

    members: int
    weight: int
    totals: Mapping[str, tuple[float, int]]

    @property
    def means(self) -> dict[str, float]:
        """Each metric's weighted mean over those who have reported it; none of one that nobody has."""
        return {name: value / weight for name, (value, weight) in self.totals.items() if weight}

    def plus(self, other: Summary) -> Summary:
        """Of the members of both."""
        totals = {
            name: (value + other.totals[name][0], weight + other.totals[name][1])
            for name, (value, weight) in self.totals.items()
        }
        return Summary(self.members + other.members, self.weight + other.weight, totals)


@dataclass(frozen=True, slots=True)
class Tail:
    """For metrics of these names, with weights up to `max_weight`, from at most `clients`.

    Raises:
        ValueError: the sums do not fit.
    """

    metrics: tuple[str, ...]
    clients: int
    max_weight: int = 1

    def __post_init__(self) -> None:
        if self.clients < 1 or self.max_weight < 1:
            raise ValueError("expected clients and weights of 1 or more")
        if self.steps < 1:
            raise ValueError(
                f"max_weight: expected sums of {self.clients} clients' metrics to fit in 62 bits, found weights up to "
                f"{self.max_weight}"
            )

    @property
    def size(self) -> int:
        return 2 + 2 * len(self.metrics)

    @property
    def steps(self) -> float:
        """How many steps are 1.0 of a metric, before its weight: a power of two."""
        return 2.0 ** math.floor(math.log2(2.0**62 / (self.clients * self.max_weight * BOUND)))

    def encode(self, weight: int, metrics: Mapping[str, float]) -> Words:
        """One member's part: words[size]. Metrics that are not agreed on, or no finite numbers, are left out.

        Raises:
            ValueError: the weight is out of range.
        """
        if not 1 <= weight <= self.max_weight:
            raise ValueError(f"expected a weight of 1 to {self.max_weight}, found {weight}")
        numbers = [1, weight]
        for name in self.metrics:
            value = metrics.get(name, math.nan)
            known = math.isfinite(value)
            bounded = min(max(value, -BOUND), BOUND) if known else 0.0
            numbers += [round(weight * bounded * self.steps), weight if known else 0]
        return RING.of(np.array(numbers, np.int64))

    def decode(self, total: Words, members: int) -> Summary:
        """The sums, which must be those of so many members.

        Raises:
            RunError: they cannot be.
        """
        numbers = [int(number) for number in RING.signed(total)]
        count, weight = numbers[:2]
        totals = {}
        possible = count == members and members <= weight <= members * self.max_weight
        for name, value, reported in zip(self.metrics, numbers[2::2], numbers[3::2], strict=True):
            possible &= reported <= weight and abs(value) <= (reported * BOUND + members) * self.steps
            totals[name] = value / self.steps, reported
        if not possible:
            raise RunError(
                f"the secure sum says that {count} members of weight {weight} are in it, where {members} are: one of "
                "them has sent something else"
            )
        return Summary(count, weight, totals)
