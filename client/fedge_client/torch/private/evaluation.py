"""Metrics of private examples: each example's own value, bounded, and the noised mean of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedge.privacy.example import ExampleLevel
from fedge.privacy.secure import SecureSource
from fedge_client.torch.private.rows import row_of

log = logging.getLogger(__name__)

Metric = Callable[[Any, Any], float]
Judge = Callable[[torch.Tensor], tuple[torch.Tensor, Any, Any]]
"""Positions int64[n] to losses float[n], outputs and targets."""


class BoundedSums:
    """Sums over examples of the loss within [0, loss_bound] and of every metric within [0, 1].

    A metric is called with one example at a time; its NaN, and where it fails, counts as 0: that work fails for
    one example would tell that it is there. All sums, each in units of its bound, are one vector, which an
    example changes by at most sqrt(k) in L2 norm.
    """

    def __init__(self, metrics: Mapping[str, Metric], level: ExampleLevel) -> None:
        if level.evaluation_noise_multiplier is None:
            raise ValueError("expected noise for an evaluation of private examples, found none")
        self._noise_multiplier = level.evaluation_noise_multiplier
        self._metrics = metrics
        self._bounds = {"loss": level.loss_bound} | dict.fromkeys(metrics, 1.0)
        self._sums = dict.fromkeys(self._bounds, 0.0)

    def add(self, losses: torch.Tensor, output: Any, target: Any) -> None:
        """The examples of one batch: their losses float[n], the model's output and the targets."""
        for value in losses.tolist():
            self._count("loss", value)
        for at in range(len(losses)) if self._metrics else ():
            row, wanted = row_of(output, at), row_of(target, at)
            for name, metric in self._metrics.items():
                try:
                    self._count(name, metric(row, wanted))
                except Exception:  # whatever it is, it must not be told
                    log.warning("private_metric_failed metric=%s", name, exc_info=True)

    def add_each(self, positions: torch.Tensor, judge: Judge) -> None:
        """The examples at `positions` (int64[n]), each by itself if together they fail."""
        try:
            judged = judge(positions)
        except Exception:
            log.warning("private_batch_failed examples=%d", len(positions), exc_info=True)
            if len(positions) > 1:
                for position in torch.split(positions, 1):
                    self.add_each(position, judge)
        else:
            self.add(*judged)

    def released(self, size: int, source: SecureSource) -> dict[str, float]:
        """The noised means over `size` examples. Every one is finite; noise may take it out of its bounds."""
        sums = np.array(list(self._sums.values()), np.float32)
        source.add_gaussian(sums, self._noise_multiplier * math.sqrt(len(sums)))
        return {
            name: float(value) * self._bounds[name] / size
            for name, value in zip(self._sums, sums, strict=True)
        }

    def _count(self, name: str, value: float) -> None:
        if not math.isnan(value):
            self._sums[name] += min(max(value / self._bounds[name], 0.0), 1.0)
