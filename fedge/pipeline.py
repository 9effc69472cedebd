"""What happens to updates between the sites' training and the strategy's step.

A pipeline is a row of layers (one-to-one: `encode` on the site, `decode` on the aggregate) around
exactly one reduction (many-to-one). All are frozen values; a reduction's running state is explicit,
is consumed by each step, and is bounded by the model's size, never by the number of clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, Protocol

import numpy as np

from fedge.exact import MAX_WEIGHT, ExactSum, Term, Values
from fedge.vector import Array

Weighting = Literal["examples", "uniform"]

_PART = 1 << 16
"""Elements handled at once when a vector is looked at in float64."""

_MAX_METRIC = 1e300

NO_METRICS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Update:
    """What one client sent: a vector (delta or gradient), what it weighs, and its metrics.

    `vector` is float32[size], an array or something that reads its slices from a file: an update of any
    size can be folded without being in memory. It is empty for an evaluation.
    """

    client: str
    vector: Values
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=lambda: NO_METRICS)
    staleness: int = 0


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a reduction makes of a cohort's updates: float32[size], and who and how much is in it."""

    vector: Array
    clients: tuple[str, ...]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=lambda: NO_METRICS)
    staleness: int = 0


class Layer(Protocol):
    """A one-to-one change of an update. `decode(encode(x))` may lose what the layer exists to lose."""

    def encode(self, vector: Array) -> Array:
        """On the site, after training: float32[n] -> float32[n]; the input is left as it was."""
        ...

    def decode(self, aggregate: Array) -> Array:
        """On the aggregate: float32[n] -> float32[n]."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Changes nothing: a pipeline of it is the plain mean."""

    def encode(self, vector: Array) -> Array:
        return vector

    def decode(self, aggregate: Array) -> Array:
        return aggregate


@dataclass(frozen=True, slots=True)
class Clip:
    """Scales an update whose L2 norm exceeds `max_norm` down to it; shorter ones pass unchanged.

    **Guarantees.** The norm of what `encode` returns, computed in float64, is at most `max_norm`.

    Raises:
        ValueError: `max_norm` is not above 0, or a vector to encode is not finite.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"expected a max_norm above 0, found {self.max_norm}")

    def encode(self, vector: Array) -> Array:
        norm = l2_norm(vector)
        if not math.isfinite(norm):
            raise ValueError("expected a finite vector to clip, found NaN or infinity in it")
        if norm <= self.max_norm:
            return vector
        scale, shrink = self.max_norm / norm, 2.0**-23
        clipped = _scaled(vector, scale)
        while l2_norm(clipped) > self.max_norm:
            # Rounding to float32 left it a hair too long. The steps double, so that this ends (with
            # zeros, at the latest) even where the numbers are subnormal and coarse.
            scale, shrink = scale * (1 - shrink), min(2 * shrink, 1.0)
            clipped = _scaled(vector, scale)
        return clipped

    def decode(self, aggregate: Array) -> Array:
        return aggregate


def _scaled(vector: Array, scale: float) -> Array:
    """`scale * vector`, computed in float64 and rounded once; one part at a time."""
    out: Array = np.empty_like(vector)
    for start in range(0, len(vector), _PART):
        part = slice(start, start + _PART)
        np.multiply(vector[part], scale, out=out[part], dtype=np.float64, casting="same_kind")
    return out


def l2_norm(vector: Values) -> float:
    """The Euclidean norm, accumulated in float64 so that no finite float32 vector overflows."""
    total = 0.0
    for start in range(0, len(vector), _PART):
        part = vector[start : start + _PART].astype(np.float64)
        part *= part
        total += float(part.sum())  # not a dot product: BLAS would wake its threads for it
    return math.sqrt(total)


@dataclass(frozen=True, eq=False)
class MeanState:
    """A mean in the making; `total` is None for updates without a vector (evaluation)."""

    total: ExactSum | None
    weight: int = 0
    num_examples: int = 0
    clients: tuple[str, ...] = ()
    metrics: tuple[tuple[int, Mapping[str, float]], ...] = ()
    staleness: int = 0
    size: int = 0
    updates: tuple[Update, ...] = ()
    """Of a reduction that looks at all of them when they are there, and how long they are."""


class Reduction(Protocol):
    """Many updates to one aggregate, a few at a time.

    One that `streams` has done with an update once it is folded; another needs its vector until the end.
    """

    @property
    def streams(self) -> bool: ...

    def start(self, size: int) -> MeanState: ...

    def fold(self, state: MeanState, *updates: Update) -> MeanState: ...

    def finish(self, state: MeanState, *updates: Update) -> Aggregate: ...


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of the updates, weighted by examples (McMahan et al. 2017, eq. 1) or uniformly.

    **Guarantees.** The aggregate's vector and metrics do not depend on the order in which updates
    are folded, to the bit; see `fedge.exact`.
    """

    weighting: Weighting = "examples"

    streams: ClassVar[bool] = True

    def start(self, size: int) -> MeanState:
        """The state before the first update; `size` 0 is a mean of metrics alone."""
        return MeanState(ExactSum(size) if size else None)

    def fold(self, state: MeanState, *updates: Update) -> MeanState:
        """`(state, updates) -> state`. Consumes the state. Values must be finite.

        Raises:
            ValueError: a number of examples is not in [1, 2^29), or a vector not of the right size;
                nothing was folded.
        """
        counted = self._count(state, updates)
        if state.total is not None:
            state.total.add(*self._terms(updates))
        return counted

    def finish(self, state: MeanState, *updates: Update) -> Aggregate:
        """The mean of what was folded and of these last updates. Consumes the state.

        Raises:
            ValueError: there are no updates at all, or one is as `fold` does not accept it.
        """
        counted = self._count(state, updates)
        if not counted.clients:
            raise ValueError("expected at least one update in a mean, found none")
        vector = np.zeros(0, np.float32)
        if state.total is not None:
            vector = state.total.mean(counted.weight, *self._terms(updates))
        return Aggregate(
            vector,
            tuple(sorted(counted.clients)),
            counted.num_examples,
            mean_of_metrics(counted.metrics),
            counted.staleness,
        )

    def _count(self, state: MeanState, updates: Sequence[Update]) -> MeanState:
        """The state with everything of these updates in it but their vectors."""
        for update in updates:
            if not 1 <= update.num_examples < MAX_WEIGHT:
                raise ValueError(f"expected num_examples in [1, {MAX_WEIGHT}), found {update.num_examples}")
        weights = [self.weight(update) for update in updates]
        return MeanState(
            state.total,
            state.weight + sum(weights),
            state.num_examples + sum(update.num_examples for update in updates),
            (*state.clients, *(update.client for update in updates)),
            (*state.metrics, *zip(weights, (update.metrics for update in updates), strict=True)),
            max((state.staleness, *(update.staleness for update in updates))),
        )

    def _terms(self, updates: Sequence[Update]) -> list[Term]:
        return [Term(update.vector, self.weight(update)) for update in updates]

    def weight(self, update: Update) -> int:
        """What an update counts for."""
        return update.num_examples if self.weighting == "examples" else 1


def mean_of_metrics(metrics: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Each metric's weighted mean over the clients that report it, whatever the order.

    A mean that a client's NaN, infinity or absurd number (past 1e300) would decide is NaN.
    """
    products: dict[str, list[float]] = {}
    weights: dict[str, int] = {}
    for weight, values in metrics:
        for name, value in values.items():
            products.setdefault(name, []).append(weight * value)
            weights[name] = weights.get(name, 0) + weight
    return {name: _mean(products[name], weights[name]) for name in sorted(products)}


def _mean(products: list[float], weight: int) -> float:
    if not all(abs(product) <= _MAX_METRIC for product in products):  # false for NaN, too
        return math.nan
    return math.fsum(products) / weight


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Layers around one reduction. Sites encode in order; the aggregate is decoded in reverse."""

    reduction: Reduction
    layers: tuple[Layer, ...] = ()

    @property
    def streams(self) -> bool:
        return self.reduction.streams

    def encode(self, vector: Array) -> Array:
        for layer in self.layers:
            vector = layer.encode(vector)
        return vector

    def start(self, size: int) -> MeanState:
        return self.reduction.start(size)

    def fold(self, state: MeanState, *updates: Update) -> MeanState:
        return self.reduction.fold(state, *updates)

    def finish(self, state: MeanState, *updates: Update) -> Aggregate:
        aggregate = self.reduction.finish(state, *updates)
        vector = aggregate.vector
        for layer in reversed(self.layers):
            vector = layer.decode(vector)
        return Aggregate(
            vector, aggregate.clients, aggregate.num_examples, aggregate.metrics, aggregate.staleness
        )
