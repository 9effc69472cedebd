"""Federated averaging: McMahan et al. 2017, "Communication-efficient learning of deep networks from
decentralized data", Algorithm 1, with the server learning rate of Reddi et al. 2021, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedge.pipeline import Aggregate, Mean, Weighting
from fedge.robust import CoordinateMedian, TrimmedMean
from fedge.strategy import Order
from fedge.vector import Array, Model


@dataclass(frozen=True, eq=False)
class FedAvgState:
    """The model, float32[n]; its first `trainable` elements are what an optimiser moves."""

    model: Array
    trainable: int


@dataclass(frozen=True, slots=True)
class FedAvg:
    """theta <- theta + eta_s * (sum_i w_i (theta_i - theta)) / (sum_i w_i), after local steps.

    `weighting` is by examples or uniform; eta_s is `server_learning_rate`, and is 1 for floating-point buffers. In
    place of the mean there may be the median of each coordinate, or its mean without the share `trim` at both ends, in
    which updates count the same (`fedge.robust`).
    """

    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    weighting: Weighting = "examples"
    aggregation: Literal["mean", "median", "trimmed_mean"] = "mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1

    @property
    def reduction(self) -> Mean | CoordinateMedian | TrimmedMean:
        match self.aggregation:
            case "mean":
                return Mean(self.weighting)
            case "median":
                return CoordinateMedian()
            case "trimmed_mean":
                return TrimmedMean(self.trim)

    @property
    def max_staleness(self) -> None:
        return None

    def init(self, model: Model) -> FedAvgState:
        return FedAvgState(model.vector, model.layout.trainable_size)

    def order(self, state: FedAvgState, round: int) -> Order:
        return Order("train")

    def step(self, state: FedAvgState, aggregate: Aggregate) -> FedAvgState:
        model = moved(state.model, aggregate, trainable=state.trainable, rate=self.server_learning_rate)
        return FedAvgState(model, state.trainable)


def moved(model: Array, aggregate: Aggregate, *, trainable: int, rate: float) -> Array:
    """The model and a mean update, of whose first `trainable` elements `rate` times as much. Consumes the aggregate,
    whose memory becomes the new model's: no third vector is needed."""
    update = aggregate.vector
    # The tail (batch statistics) is averaged as it is: a longer step could make a variance negative.
    update[:trainable] *= np.float32(rate)
    update += model
    return update
