"""What a run has learned: the strategy's state, and the aggregates in the making. Pure, as its parts are.

The coordinator and the simulator differ in where updates come from; what becomes of them is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from fedge.errors import RunError
from fedge.events import OrderId
from fedge.pipeline import Aggregate, Mean, MeanState, Pipeline, Reduction, Update
from fedge.privacy.central import Central, Noising
from fedge.privacy.secure import SecureSource
from fedge.strategy import AnyStrategy, Order, WorkKind
from fedge.vector import Array, Layout, Model, all_finite


@dataclass(frozen=True, eq=False)
class Kept:
    """What a checkpoint of a run with client-level privacy holds: no noise."""

    state: Any
    clip: float


@dataclass(frozen=True, eq=False)
class Learning:
    """A strategy, its state, and for each kind of order that is open what was folded so far.

    `central` is client-level privacy by the coordinator, and `noising` its state.
    """

    strategy: AnyStrategy
    layout: Layout
    state: Any
    folds: Mapping[WorkKind, MeanState] = field(default_factory=lambda: MappingProxyType({}))
    central: Central | None = None
    noising: Noising | None = None

    @classmethod
    def begin(cls, strategy: AnyStrategy, model: Model, central: Central | None = None) -> Learning:
        """Before the first round.

        Raises:
            ConfigError: the strategy cannot be run with the noise of `central`.
        """
        if central is None:
            return cls(strategy, model.layout, strategy.init(model))
        central.check(strategy)
        return cls(strategy, model.layout, strategy.init(model), central=central, noising=central.begin())

    @property
    def kept(self) -> Any:
        """What a checkpoint holds of it; `revived` takes that."""
        return self.state if self.noising is None else Kept(self.state, self.noising.clip)

    def revived(self, kept: Any) -> Learning:
        """As it was when `kept` was taken. Noise begins anew, which costs nothing: see `fedge.privacy.banded`."""
        if self.noising is None:
            return replace(self, state=kept, folds={})
        return replace(self, state=kept.state, folds={}, noising=Noising(kept.clip))

    @property
    def model(self) -> Model:
        """The model of the last committed round."""
        return Model(self.vector, self.layout)

    @property
    def vector(self) -> Array:
        """Its parameters, float32[layout.size]."""
        vector: Array = self.state.model
        return vector

    def order(self, round: int) -> Order:
        """What the strategy wants done with the current model."""
        order = self.strategy.order(self.state, round)
        return order if self.noising is None else replace(order, clip=self.noising.clip)

    def fold(self, order: OrderId, *updates: Update) -> Learning:
        """Add accepted updates to the aggregate of their order. Consumes what was folded before."""
        folded = Pipeline(self._reduction(order)).fold(self._folded(order), *updates)
        return replace(self, folds={**self.folds, order.kind: folded})

    def streams(self, order: OrderId) -> bool:
        """Whether an update for an order is not needed any more once it is folded."""
        return self._reduction(order).streams

    def abandon(self, order: OrderId) -> Learning:
        """Drop what was folded for an order that is given up."""
        return replace(self, folds={kind: fold for kind, fold in self.folds.items() if kind != order.kind})

    def close(
        self, order: OrderId, *updates: Update, source: SecureSource | None = None
    ) -> tuple[Learning, Aggregate]:
        """Finish an order's aggregate and, unless it was an evaluation, make the strategy's step.

        The order's last updates are folded on the way: a round that has no others needs no memory for
        sums. `source` is of noise, for a run that is to have some. What comes of it may be told to anybody
        only when it is certain that this order is not closed again, with other noise.

        Raises:
            RunError: the new model has NaN or infinity in it.
        """
        aggregate = Pipeline(self._reduction(order)).finish(self._folded(order), *updates)
        return self.close_with(order, aggregate, source=source)

    def weights(self, order: OrderId, *updates: Update) -> list[int] | None:
        """What each weighs in the mean that an order's aggregate is of these alone; None if it is something else."""
        reduction = self._reduction(order)
        if not isinstance(reduction, Mean) or order.kind in self.folds:
            return None
        return [reduction.weight(update) for update in updates]

    def described(self, order: OrderId, mean: Array, *updates: Update) -> Aggregate:
        """An order's aggregate of these updates alone, whose mean was made elsewhere; for `close_with`."""
        reduction = self._reduction(order)
        return replace(reduction.finish(reduction.start(0), *updates), vector=mean)

    def close_with(
        self, order: OrderId, aggregate: Aggregate, *, source: SecureSource | None = None
    ) -> tuple[Learning, Aggregate]:
        """As `close`, with an aggregate that was made elsewhere: as a secure sum.

        Raises:
            RunError: the new model has NaN or infinity in it.
        """
        rest = self.abandon(order)
        if self.central is not None:
            assert self.noising is not None  # both or neither
            if source is None:
                raise ValueError("expected a source of noise for a run with client-level privacy, found none")
            if order.kind == "evaluate":
                return rest, self.central.release_metrics(aggregate, source)
            noising, aggregate = self.central.release(
                self.noising, aggregate, source, trainable=self.layout.trainable_size
            )
            rest = replace(rest, noising=noising)
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
        return Pipeline(self._reduction(order)).start(0 if order.kind == "evaluate" else self.layout.size)

    def _reduction(self, order: OrderId) -> Reduction:
        if self.central is None or self.noising is None:
            return self.strategy.reduction
        if order.kind == "evaluate":
            return self.central.evaluation()
        return self.central.reduction(self.noising)
