"""What a run has learned: the strategy's state, and the aggregates in the making. Pure, as its parts are.

The coordinator and the simulator differ in where updates come from; what becomes of them is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fedge.errors import RunError
from fedge.pipeline import Aggregate, MeanState, Pipeline, Update
from fedge.round import OrderId
from fedge.strategy import AnyStrategy, Order, WorkKind
from fedge.vector import Layout, Model


@dataclass(frozen=True, eq=False)
class Learning:
    """A strategy, its state, and for each kind of order that is open what was folded so far."""

    strategy: AnyStrategy
    layout: Layout
    state: Any
    folds: Mapping[WorkKind, MeanState] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def begin(cls, strategy: AnyStrategy, model: Model) -> Learning:
        return cls(strategy, model.layout, strategy.init(model))

    @property
    def model(self) -> Model:
        """The model of the last committed round."""
        return Model(self.state.model, self.layout)

    def order(self, round: int) -> Order:
        """What the strategy wants done with the current model."""
        return self.strategy.order(self.state, round)

    def fold(self, order: OrderId, update: Update) -> Learning:
        """Add an accepted update to the aggregate of its order. Consumes what was folded before."""
        pipeline = Pipeline(self.strategy.reduction)
        folded = self.folds.get(order.kind)
        if folded is None:
            folded = pipeline.start(0 if order.kind == "evaluate" else self.layout.size)
        return replace(self, folds={**self.folds, order.kind: pipeline.fold(folded, update)})

    def abandon(self, order: OrderId) -> Learning:
        """Drop what was folded for an order that is given up."""
        return replace(self, folds={kind: fold for kind, fold in self.folds.items() if kind != order.kind})

    def close(self, order: OrderId) -> tuple[Learning, Aggregate]:
        """Finish an order's aggregate and, unless it was an evaluation, make the strategy's step.

        Raises:
            RunError: the new model has NaN or infinity in it.
        """
        aggregate = Pipeline(self.strategy.reduction).finish(self.folds[order.kind])
        rest = self.abandon(order)
        if order.kind == "evaluate":
            return rest, aggregate
        # The step consumes the aggregate's vector, so nobody else is given it.
        state = self.strategy.step(self.state, aggregate)
        if not np.isfinite(state.model).all():
            raise RunError(
                f"round {order.round} made a model with NaN or infinity: "
                "lower the learning rate or clip the updates"
            )
        return replace(rest, state=state), replace(aggregate, vector=aggregate.vector[:0])
