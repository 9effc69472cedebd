"""What a run has learned: the strategy's state, and the aggregates in the making. Pure, as its parts are.

The coordinator and the simulator differ in where updates come from; what becomes of them is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from fedge.errors import RunError
from fedge.pipeline import Aggregate, MeanState, Pipeline, Update
from fedge.round import OrderId
from fedge.strategy import AnyStrategy, Order, WorkKind
from fedge.vector import Layout, Model, all_finite


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

    def fold(self, order: OrderId, *updates: Update) -> Learning:
        """Add accepted updates to the aggregate of their order. Consumes what was folded before."""
        folded = Pipeline(self.strategy.reduction).fold(self._folded(order), *updates)
        return replace(self, folds={**self.folds, order.kind: folded})

    def abandon(self, order: OrderId) -> Learning:
        """Drop what was folded for an order that is given up."""
        return replace(self, folds={kind: fold for kind, fold in self.folds.items() if kind != order.kind})

    def close(self, order: OrderId, *updates: Update) -> tuple[Learning, Aggregate]:
        """Finish an order's aggregate and, unless it was an evaluation, make the strategy's step.

        The order's last updates are folded on the way: a round that has no others needs no memory for
        sums.

        Raises:
            RunError: the new model has NaN or infinity in it.
        """
        aggregate = Pipeline(self.strategy.reduction).finish(self._folded(order), *updates)
        rest = self.abandon(order)
        if order.kind == "evaluate":
            return rest, aggregate
        # The step consumes the aggregate's vector, so nobody else is given it.
        state = self.strategy.step(self.state, aggregate)
        if not all_finite(state.model):
            raise RunError(
                f"round {order.round} made a model with NaN or infinity: "
                "lower the learning rate or clip the updates"
            )
        return replace(rest, state=state), replace(aggregate, vector=aggregate.vector[:0])

    def _folded(self, order: OrderId) -> MeanState:
        folded = self.folds.get(order.kind)
        if folded is not None:
            return folded
        return Pipeline(self.strategy.reduction).start(0 if order.kind == "evaluate" else self.layout.size)
