"""fedge's strategies in Flower's ServerApp: Flower asks its nodes, and what they return is combined here.

    strategy = InFlower(FedAvg(aggregation="median"))
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=10)

Needs flwr (`pip install 'fedge[flower]'`). Sampling, messages and metrics are Flower's own.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from flwr.serverapp.strategy import Strategy

from fedge.errors import ConfigError, RemoteProtocolError
from fedge.events import OrderId
from fedge.exact import MAX_WEIGHT
from fedge.learning import Learning
from fedge.pipeline import Update
from fedge.strategy import AnyStrategy, first_order
from fedge.vector import Model, all_finite
from fedge_flower import quantised
from fedge_flower.asked import Asked, ask
from fedge_flower.layouts import model_of, record_of, vector_of

log = logging.getLogger(__name__)


class InFlower(Strategy):
    """A fedge strategy as one of Flower's. `sampling` are the arguments of Flower's own FedAvg.

    Nodes return what they return to FedAvg: arrays of the same names and shapes, and metrics with "num-examples". Under
    strategies of gradients (`mirrored_sgd`, `sgd`) the arrays are the gradients of the node's loss, as the setting
    "fedge-work" says. One that returns anything else is left out, with a warning. `sgd` applies each gradient by
    itself, in the order of the replies, and leaves out those that more than `max_staleness` others came before.

    Floating-point arrays are combined in float32, whatever their own type; integers stay as they were sent. No
    optimiser moves the arrays named in `buffers` (batch statistics): they become the mean of what nodes return.

    Raises:
        ConfigError: Flower's FedAvg does not know one of `sampling`, or the strategy corrects its clients' gradients.
    """

    def __init__(self, strategy: AnyStrategy, *, buffers: Collection[str] = (), **sampling: Any) -> None:
        self.strategy = strategy
        self._buffers = frozenset(buffers)
        try:
            self._flowers = FlowersFedAvg(**sampling)
        except TypeError as error:
            raise ConfigError(f"expected arguments of Flower's FedAvg: {error}") from None
        order = first_order(strategy)
        if order.control is not None:
            raise ConfigError(
                f"{type(strategy).__name__} corrects the gradients of its clients by control variates, of which a "
                "ClientApp does not know: train by a fedge Task (fedge simulate, fedge run submit)"
            )
        self._kind = order.kind
        self._learning: Learning | None = None
        self._arrays = ArrayRecord()

    @property
    def learned(self) -> Model | None:
        """The model of the last round; None before the first."""
        return self._learning.model if self._learning is not None else None

    def summary(self) -> None:
        """Log what it is."""
        log.info("fedge strategy %r, nodes return their %s", self.strategy, self._kind)
        self._flowers.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages as Flower's FedAvg makes them, which say what nodes are to return."""
        self._go_on_from(arrays)
        ask(config, self._kind, self._buffers)
        return self._flowers.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model, and the mean of the metrics; None if there is nothing to make them of.

        Raises:
            RunError: the new model has NaN or infinity in it.
            ValueError: there was no `configure_train` before.
        """
        if self._learning is None:
            raise ValueError("expected configure_train before aggregate_train")
        updates, good = [], []
        kind: Literal["train", "gradient"] = "gradient" if self._kind == "gradient" else "train"
        asked = Asked(kind, {"arrays": self._arrays}, self._buffers)
        for reply in replies:
            if (update := self._update_of(reply, self._learning.model, asked)) is not None:
                updates.append(update)
                good.append(reply.content)
        if not updates:
            return None, None
        self._learning = self._stepped(self._learning, server_round, updates)
        self._arrays = record_of(self._learning.vector, self._learning.layout, self._arrays)
        return self._arrays, self._flowers.train_metrics_aggr_fn(good, self._flowers.weighted_by_key)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's FedAvg."""
        return self._flowers.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As Flower's FedAvg."""
        return self._flowers.aggregate_evaluate(server_round, replies)

    def _stepped(self, learning: Learning, round: int, updates: list[Update]) -> Learning:
        """After a round's step, or after one for each update that is not too stale."""
        bound = self.strategy.max_staleness
        if bound is None:
            return learning.close(OrderId(self._kind, round, 1), *updates)[0]
        for step, update in enumerate(updates):
            if step > bound:
                log.warning("update_refused node=%s reason=%d steps too late", update.client, step - bound)
                continue
            learning = learning.close(OrderId(self._kind, round, step + 1), update)[0]
        return learning

    def _go_on_from(self, arrays: ArrayRecord) -> None:
        """Begin with these arrays, unless they are those of the last round."""
        if self._learning is not None and arrays is self._arrays:
            return
        model = self._model_of(arrays)
        known = self._learning.model if self._learning is not None else None
        if known is None or known.layout != model.layout or not np.array_equal(known.vector, model.vector):
            if known is not None:
                log.warning("strategy_begins_anew because=the arrays are not those of its last round")
            self._learning = Learning.begin(self.strategy, model)
        self._arrays = arrays

    def _model_of(self, arrays: ArrayRecord) -> Model:
        model = model_of(arrays, buffers=self._buffers)
        if not all_finite(model.vector):
            raise ConfigError("expected initial arrays of finite numbers, found NaN or infinity in them")
        return model

    def _update_of(self, reply: Message, model: Model, asked: Asked) -> Update | None:
        """What a node has returned, as a change of the model or a gradient; None if it is of no use."""
        node = reply.metadata.src_node_id
        try:
            if reply.has_error():
                raise RemoteProtocolError(f"an error: {reply.error.reason}")
            return self._checked(str(node), quantised.taken(reply.content, asked), model)
        except Exception as error:  # noqa: BLE001  # it is a stranger's, and may be anything
            log.warning("reply_left_out node=%d reason=%s: %s", node, type(error).__name__, error)
            return None

    def _checked(self, node: str, content: RecordDict, model: Model) -> Update:
        ((_, arrays),) = content.array_records.items()
        ((_, metrics),) = content.metric_records.items()
        examples = metrics[self._flowers.weighted_by_key]
        if isinstance(examples, list) or not 1 <= examples < MAX_WEIGHT or examples != int(examples):
            raise RemoteProtocolError(f"expected a whole number of examples from 1, found {examples}")
        vector = vector_of(model.layout, arrays)
        if self._kind == "train":
            vector -= model.vector
        elif self._buffers:
            vector[model.layout.trainable_size :] -= model.vector[model.layout.trainable_size :]
        if not all_finite(vector):
            raise RemoteProtocolError("expected finite numbers, found NaN or infinity")
        return Update(node, vector, int(examples))


class Dequantised(Strategy):
    """Any strategy of Flower's, for nodes with the mod `fedge_client.flower.quantise`: what they return is made
    floating-point arrays again before the strategy sees it, as a change of what that node was sent. Replies without
    quantisation pass as they are; one that cannot be decoded is left out, with a warning. `InFlower` needs no such
    help."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._asked: dict[int, Asked] = {}

    def summary(self) -> None:
        """Log what it is."""
        log.info("replies in eight bits are decoded, for:")
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy's own."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        different: dict[object, Asked] = {}  # most nodes are sent the same arrays
        self._asked = {}
        for each in messages:
            asked = Asked.by(each.content)
            key = asked.kind, tuple(asked.buffers), *map(id, each.content.array_records.values())
            self._asked[each.metadata.dst_node_id] = different.setdefault(key, asked)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy's own, of decoded replies."""
        return self.strategy.aggregate_train(server_round, list(self._decoded(replies)))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy's own."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the strategy's own."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _decoded(self, replies: Iterable[Message]) -> Iterable[Message]:
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_content() and node in self._asked:
                try:
                    reply.content = quantised.taken(reply.content, self._asked[node])
                except Exception as error:  # noqa: BLE001  # it is a stranger's, and may be anything
                    log.warning("reply_left_out node=%d reason=%s: %s", node, type(error).__name__, error)
                    continue
            yield reply
