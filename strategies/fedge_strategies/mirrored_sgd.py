"""Mirrored SGD: synchronous data-parallel SGD in which every client holds a mirror of the model.

Each round is one step: gradients on one batch are averaged and every mirror applies the same
optimiser to the same bits (Goyal et al. 2017, section 3; Chen et al. 2016, "Revisiting distributed
synchronous SGD"). After the first round only gradients travel. The tail of the vector, which no
optimiser moves (floating-point buffers), carries the mean of the clients' changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedge.mirror import advance
from fedge.optimizer import Kind, Optimizer, Slots, init_slots
from fedge.pipeline import Aggregate, Mean, Weighting
from fedge.strategy import Advance, Order
from fedge.vector import Array, Model


@dataclass(frozen=True, eq=False)
class MirroredState:
    """The model float32[n], the optimiser's slots, and the gradient that made this model (None at first)."""

    model: Array
    trainable: int
    slots: Slots
    gradient: Array | None = None


@dataclass(frozen=True, slots=True)
class MirroredSgd:
    """g = (sum_i w_i g_i) / (sum_i w_i); every mirror: theta <- optimizer(theta, g)."""

    optimizer: Kind = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weighting: Weighting = "examples"

    @property
    def reduction(self) -> Mean:
        return Mean(self.weighting)

    @property
    def max_staleness(self) -> None:
        return None

    @property
    def mirror_optimizer(self) -> Optimizer:
        return Optimizer(
            self.optimizer, self.learning_rate, self.momentum, self.beta1, self.beta2, self.epsilon
        )

    def init(self, model: Model) -> MirroredState:
        trainable = model.layout.trainable_size
        return MirroredState(model.vector, trainable, init_slots(self.mirror_optimizer, trainable))

    def order(self, state: MirroredState, round: int) -> Order:
        optimizer = self.mirror_optimizer
        short = Advance(state.gradient, optimizer) if state.gradient is not None else None
        return Order("gradient", optimizer, state.slots, short)

    def step(self, state: MirroredState, aggregate: Aggregate) -> MirroredState:
        model, slots = advance(
            self.mirror_optimizer, state.model, state.slots, aggregate.vector, trainable=state.trainable
        )
        return MirroredState(model, state.trainable, slots, np.asarray(aggregate.vector))
