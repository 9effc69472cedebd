"""Example-level privacy as a site does it: DP-SGD (Abadi et al. 2016, Algorithm 1) in numbers.

Add-or-remove-one adjacency on a site's training examples. The number of examples, which sets the
sampling rate, counts as known to whoever reads a statement; it never crosses the wire.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedge.privacy.calibration import releases
from fedge.privacy.mechanism import Gaussian, SampledGaussian
from fedge.run import Work


@dataclass(frozen=True, slots=True)
class ExampleLevel:
    """What the worker does to every gradient of a run, and to every evaluation.

    Each example's gradient is scaled down to the L2 norm `clip`; noise of standard deviation
    `noise_multiplier * clip` is added to their sum, which is divided by the expected size of a batch.
    `evaluation_noise_multiplier` None: nothing is evaluated. `loss_bound` is the largest loss of an example
    that an evaluation counts, other metrics are counted within [0, 1].
    """

    clip: float
    noise_multiplier: float
    evaluation_noise_multiplier: float | None = None
    loss_bound: float = 10.0

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier", "loss_bound"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a site samples: `steps` Poisson samples of `sampling_rate` in an order's work."""

    sampling_rate: float
    steps: int
    expected_batch: float

    @classmethod
    def of(cls, work: Work, size: int, kind: Literal["train", "gradient"]) -> Schedule:
        """For `size` training examples. A site with fewer than a batch uses all of them at each step.

        An epoch is ceil(size / batch_size) steps, as without privacy; a gradient is one.
        """
        batch = size if work.batch_size == "full" else min(work.batch_size, size)
        steps = 1 if kind == "gradient" else work.steps or (work.epochs or 1) * math.ceil(size / batch)
        return cls(batch / size, steps, float(batch))

    def mechanism(self, noise_multiplier: float) -> Gaussian | SampledGaussian:
        """What an order's work costs."""
        return releases(noise_multiplier, sampling_rate=self.sampling_rate, count=self.steps)


ONE_RELEASE = Schedule(1.0, 1, 1.0)
"""Everything that a site has, once: how a round counts at client level."""


def evaluation_mechanism(noise_multiplier: float) -> Gaussian:
    """What one evaluation costs: its metrics are one vector, clipped and noised as a whole."""
    return Gaussian(noise_multiplier)
