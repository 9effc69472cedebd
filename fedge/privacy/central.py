"""Client-level privacy by a trusted coordinator: DP-FedAvg with a fixed denominator (McMahan et al. 2018,
"Learning differentially private recurrent language models", section 2), and its relatives.

Each client's update counts with at most the norm `clip`; Gaussian noise is added to their sum, which is
divided by a number that does not depend on who came. Add-or-remove-one-client adjacency. Values and pure
steps: the source of noise is an argument, and whoever holds it sees to it that a round's noise is drawn again
only if nothing was told of the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedge.errors import ConfigError
from fedge.exact import ExactSum, Term, Values
from fedge.pipeline import Aggregate, Mean, MeanState, Update, l2_norm
from fedge.privacy.banded import correlate
from fedge.privacy.secure import SecureSource
from fedge.privacy.terms import Terms, price
from fedge.run import RunConfig
from fedge.strategy import AnyStrategy
from fedge.vector import Array

WITHIN = "within_clip"
"""A training round's metric: the noised share of updates that were not clipped."""

CLIP = "clip"
"""A training round's metric: the norm that its updates were clipped to."""

_CLIPPED = 1 - 2.0**-20
"""An update of at least so much of the clip was clipped: rounding leaves it a hair below."""

_SHORTER = 1 - 2.0**-22
"""What a factor loses so that float32 rounding cannot make the product too long."""

_FARTHEST = 2.0**20
"""How far an adapted clip may be from the first one, up or down."""
_FARTHEST_LOG = math.log(_FARTHEST)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Clipping at a quantile (Andrew et al. 2021, "Differentially private learning with adaptive clipping",
    Algorithm 1): C <- C exp(-learning_rate (b - target)), where b is the noised share of updates of norm <= C.

    `noise_multiplier` is the deviation of the noise on the number of those; a client changes that number,
    counted from one half of all, by one half.
    """

    target: float
    learning_rate: float
    noise_multiplier: float

    def next(self, clip: float, within: float) -> float:
        """The clip after a round in which the share `within` was not clipped: up if too many were."""
        moved = -self.learning_rate * (within - self.target)
        return clip * math.exp(
            min(max(moved, -_FARTHEST_LOG), _FARTHEST_LOG)
        )  # a noised share may be anything


@dataclass(frozen=True, eq=False)
class Noising:
    """The mechanism's state: the clip of the next round, and the noise of rounds before, the newest first.

    `recent` is float32[n] each, in units of one; it is secret until it is published, and never kept on a disk.
    """

    clip: float
    recent: tuple[Array, ...] = ()

    def __repr__(self) -> str:
        return f"Noising(clip={self.clip:g})"


@dataclass(frozen=True, slots=True)
class Central:
    """What the coordinator does to every aggregate. `noise_multiplier` is that of everything a client's turn
    releases: its part of the sum and, with `adaptive`, of the count.

    `size` and `evaluation_size` are the denominators; with `bands` above 1 the noise of successive rounds is
    correlated, for clients that rest `bands - 1` rounds after each.
    """

    noise_multiplier: float
    clip: float
    size: int
    bands: int = 1
    adaptive: Adaptive | None = None
    evaluation_noise_multiplier: float | None = None
    evaluation_size: int = 1
    loss_bound: float = 10.0

    @classmethod
    def of(cls, run: RunConfig) -> Central | None:
        """What a run asks of its coordinator; None unless that is to add the noise.

        Raises:
            ConfigError: no noise keeps what the run promises.
        """
        terms = Terms.of(run)
        if terms is None or terms.unit != "client" or run.secure_aggregation.enabled:
            return None  # those who add up in secret add the noise, too
        try:
            noise_multiplier = price(terms, run.work, "train", 1).noise_multiplier
        except ValueError as error:
            raise ConfigError(f"privacy: {error}") from None
        cohort, adaptive = run.cohort, run.privacy.adaptive_clip
        central = cls(
            noise_multiplier,
            terms.clip,
            cohort.size,
            terms.separation,
            None
            if adaptive is None
            else Adaptive(
                adaptive.target,
                adaptive.learning_rate,
                adaptive.noise_multiplier
                if adaptive.noise_multiplier is not None
                else max(cohort.size / 20, noise_multiplier),
            ),
            terms.evaluation_noise_multiplier,
            run.evaluation.clients or cohort.size,
            terms.loss_bound,
        )
        try:
            _ = central.vector_noise_multiplier
        except ValueError as error:
            raise ConfigError(f"privacy.adaptive_clip.noise_multiplier: {error}") from None
        return central

    @property
    def vector_noise_multiplier(self) -> float:
        """What is left for the sum where the count takes its part: (z^-2 - (2 z_b)^-2)^(-1/2) (ibid., theorem 1).

        Raises:
            ValueError: the count alone would take more than there is.
        """
        if self.adaptive is None:
            return self.noise_multiplier
        left = self.noise_multiplier**-2 - (2 * self.adaptive.noise_multiplier) ** -2
        if left <= 0:
            raise ValueError(
                f"expected more than {self.noise_multiplier / 2:.4g}, half the noise multiplier of a client's whole "
                f"turn, found {self.adaptive.noise_multiplier:.4g}"
            )
        return float(left**-0.5)

    def check(self, strategy: AnyStrategy) -> None:
        """Whether a strategy can be run so.

        Raises:
            ConfigError: it steps without waiting for a cohort, or wants another aggregate than a mean.
        """
        if strategy.max_staleness is not None:
            raise ConfigError(
                "privacy.unit: client-level privacy needs rounds, in which one noise hides a whole cohort's updates; "
                "this strategy steps at every update"
            )
        if not isinstance(strategy.reduction, Mean):
            raise ConfigError(
                f"privacy.unit: client-level noise is for a mean of updates; this strategy takes {strategy.reduction}"
            )

    def begin(self) -> Noising:
        return Noising(self.clip)

    def reduction(self, state: Noising) -> FixedMean:
        return FixedMean(state.clip, self.size)

    def evaluation(self) -> BoundedMetrics:
        return BoundedMetrics(self.evaluation_size, self.loss_bound)

    def release(
        self, state: Noising, aggregate: Aggregate, source: SecureSource, *, trainable: int
    ) -> tuple[Noising, Aggregate]:
        """A training round's aggregate with noise on its first `trainable` elements, and nothing in the others.

        Its metrics are the clip and, where that adapts, the noised share of updates within it.
        """
        vector, deviation = aggregate.vector, self.vector_noise_multiplier * state.clip / self.size
        noised, rest = vector[:trainable], vector[trainable:]
        rest[:] = 0
        recent = state.recent
        if self.bands == 1:
            source.add_gaussian(noised, deviation)
        else:
            fresh = np.zeros(trainable, np.float32)
            source.add_gaussian(fresh, 1.0)
            noise = correlate(fresh, recent, self.bands)
            noised += np.float32(deviation) * noise
            recent = (noise, *recent)[: self.bands - 1]
        if self.adaptive is None:
            return Noising(state.clip, recent), replace(aggregate, metrics={CLIP: state.clip})
        within = self._within(aggregate, source)
        clip = min(max(self.adaptive.next(state.clip, within), self.clip / _FARTHEST), self.clip * _FARTHEST)
        return Noising(clip, recent), replace(aggregate, metrics={CLIP: state.clip, WITHIN: within})

    def release_metrics(self, aggregate: Aggregate, source: SecureSource) -> Aggregate:
        """An evaluation's aggregate with noise on its metrics, which are one vector in units of their bounds."""
        assert self.evaluation_noise_multiplier is not None  # Terms insists on it where there are evaluations
        names = sorted(aggregate.metrics)
        noise = np.zeros(len(names), np.float32)
        source.add_gaussian(noise, self.evaluation_noise_multiplier * math.sqrt(len(names)))
        bounds = _bounds(names, self.loss_bound)
        metrics = {
            name: aggregate.metrics[name] + float(drawn) * bounds[name] / self.evaluation_size
            for name, drawn in zip(names, noise, strict=True)
        }
        return replace(aggregate, metrics=metrics)

    def _within(self, aggregate: Aggregate, source: SecureSource) -> float:
        assert self.adaptive is not None  # asked only then
        drawn = np.zeros(1, np.float32)
        source.add_gaussian(drawn, self.adaptive.noise_multiplier)
        from_half = aggregate.metrics[WITHIN] - len(aggregate.clients) / 2
        return 0.5 + (from_half + float(drawn[0])) / self.size

    def __str__(self) -> str:
        correlated = f", correlated over {self.bands} rounds" if self.bands > 1 else ""
        return f"Gaussian noise of {self.noise_multiplier:.6g} x the clip on the sum of updates{correlated}"


@dataclass(frozen=True, slots=True)
class FixedMean:
    """The sum of updates, each scaled down to the norm `clip`, divided by `size` however many there are.

    **Guarantees.** With or without one client's update the sum differs by at most `clip` in L2 norm. Its metric
    is the number of updates that were not clipped; what clients report is dropped.
    """

    clip: float
    size: int

    streams: ClassVar[bool] = True

    def start(self, size: int) -> MeanState:
        return MeanState(ExactSum(size))

    def fold(self, state: MeanState, *updates: Update) -> MeanState:
        """`(state, updates) -> state`. Consumes the state. Values must be finite."""
        assert state.total is not None  # `start` made it
        counted, terms = self._count(state, updates)
        state.total.add(*terms)
        return counted

    def finish(self, state: MeanState, *updates: Update) -> Aggregate:
        """The aggregate, without noise yet. Consumes the state.

        Raises:
            ValueError: there are no updates at all.
        """
        assert state.total is not None
        counted, terms = self._count(state, updates)
        if not counted.clients:
            raise ValueError("expected at least one update in a mean, found none")
        vector = state.total.mean(self.size, *terms)
        within = math.fsum(metrics[WITHIN] for _, metrics in counted.metrics)
        return Aggregate(vector, tuple(sorted(counted.clients)), counted.num_examples, {WITHIN: within})

    def _count(self, state: MeanState, updates: Sequence[Update]) -> tuple[MeanState, list[Term]]:
        norms = [l2_norm(update.vector) for update in updates]
        terms = [
            Term(
                update.vector if norm <= self.clip else _Scaled(update.vector, _SHORTER * self.clip / norm),
                1,
            )
            for update, norm in zip(updates, norms, strict=True)
        ]
        within = [(1, {WITHIN: float(norm < self.clip * _CLIPPED)}) for norm in norms]
        counted = MeanState(
            state.total,
            state.weight + len(updates),
            state.num_examples + len(updates),
            (*state.clients, *(update.client for update in updates)),
            (*state.metrics, *within),
        )
        return counted, terms


@dataclass(frozen=True, slots=True)
class BoundedMetrics:
    """An evaluation: the sum of each metric within its bound, divided by `size` however many report it."""

    size: int
    loss_bound: float

    streams: ClassVar[bool] = True

    def start(self, size: int) -> MeanState:
        return MeanState(None)

    def fold(self, state: MeanState, *updates: Update) -> MeanState:
        """`(state, updates) -> state`."""
        return MeanState(
            None,
            state.weight + len(updates),
            state.num_examples + len(updates),
            (*state.clients, *(update.client for update in updates)),
            (*state.metrics, *((1, update.metrics) for update in updates)),
        )

    def finish(self, state: MeanState, *updates: Update) -> Aggregate:
        """The aggregate, without noise yet."""
        counted = self.fold(state, *updates)
        names = sorted({name for _, metrics in counted.metrics for name in metrics})
        bounds = _bounds(names, self.loss_bound)
        sums = {
            name: math.fsum(_bounded(metrics.get(name, 0.0), bounds[name]) for _, metrics in counted.metrics)
            for name in names
        }
        return Aggregate(
            np.zeros(0, np.float32),
            tuple(sorted(counted.clients)),
            counted.num_examples,
            {name: total / self.size for name, total in sums.items()},
        )


def _bounds(names: Sequence[str], loss_bound: float) -> Mapping[str, float]:
    return {name: loss_bound if name == "loss" else 1.0 for name in names}


def _bounded(value: float, bound: float) -> float:
    return 0.0 if math.isnan(value) else min(max(value, 0.0), bound)


@dataclass(frozen=True, slots=True, eq=False)
class _Scaled:
    """`factor * values`, a slice at a time."""

    values: Values
    factor: float

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice, /) -> Array:
        scaled: Array = np.multiply(
            self.values[part], self.factor, dtype=np.float64, casting="same_kind"
        ).astype(np.float32)
        return scaled
