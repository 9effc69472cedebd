"""Order messages: the model and, for mirrors, the short way to it; encoded once a round for everybody."""

from __future__ import annotations

import numpy as np

from fedge.events import OrderId
from fedge.strategy import Order, WorkKind
from fedge.variates import Settled
from fedge.vector import Array
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_optimizer, encode_order_id
from fedge_server.shelf import Shelf


class Orders:
    """The current model as orders describe it."""

    def __init__(self, run_id: str, shelf: Shelf, *, personal: bool = False) -> None:
        """`personal`: clients have layers of their own, and are told which of their updates count."""
        self._run_id, self._personal = run_id, personal
        self._shelf = shelf
        self._model = pb.Blob()
        self._mirror: pb.Mirror | None = None
        self._clip: float | None = None
        self._control: pb.Blob | None = None
        self._messages: dict[OrderId, pb.ServerMessage] = {}

    def publish(self, model: Array, order: Order) -> None:
        """Take a committed model, and what the strategy wants done with it."""
        previous = self._model.digest
        vectors = [model]
        if order.slots is not None:
            vectors.append(np.concatenate(order.slots.vectors) if order.slots.vectors else model[:0])
        if order.advance is not None:
            vectors.append(order.advance.gradient)
        if order.control is not None:
            vectors.append(order.control)
        self._model, *others = self._shelf.replace(vectors)
        if order.advance is not None:
            # Mirrors need only the gradient: the model and the slots are there for those who fetch them.
            for blob in (self._model, others[0]):
                blob.ClearField("inline")
        self._mirror = None
        if order.optimizer is not None and order.slots is not None:
            self._mirror = pb.Mirror(
                optimizer=encode_optimizer(order.optimizer),
                slots=others[0],
                beta1_power=order.slots.beta1_power,
                beta2_power=order.slots.beta2_power,
                advance=pb.Advance(from_digest=previous, gradient=others[1]) if order.advance else None,
            )
        self._clip = order.clip
        self._control = others[-1] if order.control is not None else None
        self._messages.clear()

    def message(self, order: OrderId, *, deadline_s: float) -> pb.ServerMessage:
        """The order to do with the current model."""
        if order not in self._messages:
            self._messages[order] = pb.ServerMessage(
                order=pb.Order(
                    run_id=self._run_id,
                    id=encode_order_id(order),
                    deadline_s=deadline_s,
                    model=self._model,
                    mirror=self._mirror,
                    clip=self._clip,
                    control=self._control_of(order.kind),
                )
            )
        return self._messages[order]

    def _control_of(self, kind: WorkKind) -> pb.Control | None:
        if self._control is not None and kind == "train":
            return pb.Control(variate=self._control)
        return pb.Control() if self._personal else None

    @staticmethod
    def with_settled(message: pb.ServerMessage, settled: Settled) -> pb.ServerMessage:
        """An order for a client that keeps a state of its own, by what has come of its updates."""
        own = pb.ServerMessage()
        own.CopyFrom(message)
        own.order.control.kept = settled.kept
        if settled.counted is not None:
            round, attempt = settled.counted
            own.order.control.counted.CopyFrom(encode_order_id(OrderId("train", round, attempt)))
        return own

    def inline_bytes(self, kind: WorkKind) -> int:
        """Bytes of vectors that ride in each order of a kind."""
        blobs = [self._model]
        if self._mirror is not None:
            blobs += [self._mirror.slots, self._mirror.advance.gradient]
        if self._control is not None and kind == "train":
            blobs.append(self._control)
        return sum(len(blob.inline) for blob in blobs)  # an absent blob is an empty one
