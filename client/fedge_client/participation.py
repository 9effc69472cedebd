"""A run that this site takes part in: a value that the agent's jobs keep, not what they do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedge.events import OrderId
from fedge.privacy.mechanism import Mechanism
from fedge.run import Work
from fedge.secagg.terms import SumTerms
from fedge.strategy import WorkKind
from fedge.vector import Array, Layout
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_order_id
from fedge_client.gate import Released
from fedge_client.holding import Holding
from fedge_client.outbox import Lost, Prepared
from fedge_client.protection import Protection


@dataclass(frozen=True, slots=True)
class Unmasked:
    """What the gate has released for an order of a secure sum: for each attempt at its round that asks the same."""

    round: int
    asked: bytes
    """The digest of what its order asked."""
    released: Released
    paid: bool = False
    """Whether it was masked for an attempt, and may have left."""


@dataclass(slots=True)
class Participation:
    """A run that this site takes part in, and the last update that it prepared for it."""

    run_id: str
    layout: Layout
    clip: float | None
    """What updates are clipped to, unless their order says otherwise."""
    protection: Protection
    kind: WorkKind
    """What it orders, beside evaluations."""
    terms: bytes
    """The digest of what was asked when it was joined."""
    work: Work
    secure: SumTerms | None
    """How its updates are summed; None: they leave one by one, as the gate has released them."""
    holding: Holding
    update: Array
    prepared: Prepared | Lost | None = None
    sent: bool = False
    """Whether a part of `prepared` may have arrived."""
    kept: bool = False
    """Whether its vector is on disk."""
    personal: int = 0
    """Elements of its personal layers."""
    variate: tuple[OrderId, Array] | None = None
    """The control variate, or the personal layers, that the latest training has made, until they are on disk."""
    unmasked: dict[WorkKind, Unmasked] = field(default_factory=dict)
    """Of secure sums: what the gate released last. Gone once it was masked with noise, which pays for one attempt."""
    reserved: tuple[int, Mechanism] | None = None
    """The ledger's entry for what was done and has not left yet, and its price."""
    unsettled: tuple[int, Mechanism] | None = None
    """The same for what may have left, until it was handed in."""

    def answer(self, order: OrderId, model: bytes) -> Prepared | None:
        """What was prepared, if it answers this order; under privacy also another attempt at its round.

        Fresh noise for the same work would cost the budget again: the same bytes cost nothing.
        """
        if not isinstance(self.prepared, Prepared):
            return None
        if self.prepared.answers(order, model):
            return self.prepared
        earlier = replace(self.prepared.order, attempt=order.attempt)
        if self.protection.is_on and self.secure is None and (earlier, self.prepared.model) == (order, model):
            return _renamed(self.prepared, order)
        return None


def _renamed(prepared: Prepared, order: OrderId) -> Prepared:
    """The same update for another attempt at the same round, on the same model."""
    update = pb.Update()
    update.CopyFrom(prepared.update)
    update.id.CopyFrom(encode_order_id(order))
    return replace(prepared, order=order, update=update)
