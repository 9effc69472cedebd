"""Parameter-server SGD: each gradient is applied as it arrives, with a bounded staleness.

Dean et al. 2012, "Large scale distributed deep networks" (Downpour SGD); the bound is that of stale
synchronous parallel, Ho et al. 2013.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedge.mirror import advance
from fedge.optimizer import Kind, Optimizer, Slots, init_slots
from fedge.pipeline import Aggregate, Mean
from fedge.strategy import Order
from fedge.vector import Array, Model


@dataclass(frozen=True, eq=False)
class SgdState:
    """The model float32[n] and the optimiser's slots."""

    model: Array
    trainable: int
    slots: Slots


@dataclass(frozen=True, slots=True)
class Sgd:
    """theta <- optimizer(theta, g) for each gradient g that arrives at most `max_staleness` steps late.

    A gradient computed on a model that is older than that is refused, and its client is sent the
    current model. A round is one applied gradient.
    """

    optimizer: Kind = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_staleness: Annotated[int, Field(ge=0)] = 16

    @property
    def reduction(self) -> Mean:
        return Mean("uniform")

    @property
    def server_optimizer(self) -> Optimizer:
        return Optimizer(
            self.optimizer, self.learning_rate, self.momentum, self.beta1, self.beta2, self.epsilon
        )

    def init(self, model: Model) -> SgdState:
        trainable = model.layout.trainable_size
        return SgdState(model.vector, trainable, init_slots(self.server_optimizer, trainable))

    def order(self, state: SgdState, round: int) -> Order:
        return Order("gradient")

    def step(self, state: SgdState, aggregate: Aggregate) -> SgdState:
        model, slots = advance(
            self.server_optimizer, state.model, state.slots, aggregate.vector, trainable=state.trainable
        )
        return SgdState(model, state.trainable, slots)
