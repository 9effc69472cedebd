"""Mods that bound what a ClientApp returns. They are of the app's own code: in a native run the gate is the site's."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message

from fedge.pipeline import Clip
from fedge.vector import all_finite
from fedge_flower.layouts import layout_of, record_of, vector_of

ClientAppCall = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCall], Message]


def clip(max_norm: float) -> Mod:
    """A mod that scales what a node's training has changed down to an L2 norm of `max_norm`, all floating-point arrays
    together, in float32; shorter changes pass as they are.

    Arrays of other types go back as they were sent. Messages whose replies have no arrays pass. A reply that has other
    arrays than the message, or NaN or infinity in them, becomes an error: ValueError, and nothing of it leaves.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    layer = Clip(max_norm)

    def mod(message: Message, context: Context, call_next: ClientAppCall) -> Message:
        sent = dict(message.content.array_records)
        reply = call_next(message, context)
        if reply.has_error() or not reply.content.array_records:
            return reply
        for name, record in list(reply.content.array_records.items()):
            before = sent.get(name) or (next(iter(sent.values())) if len(sent) == 1 else None)
            if before is None:
                raise ValueError(f"expected arrays that were sent, found a record {name[:80]!r}")
            reply.content[name] = _clipped(before, record, layer)
        return reply

    return mod


def _clipped(before: ArrayRecord, after: ArrayRecord, layer: Clip) -> ArrayRecord:
    """`before`, and what is between them as the layer leaves it."""
    if list(before) != list(after):
        raise ValueError(f"expected arrays {list(before)[:8]}, found {list(after)[:8]}")
    layout = layout_of(before)
    start = vector_of(layout, before)
    change = vector_of(layout, after) - start
    if not all_finite(change):
        raise ValueError("expected a finite change of the arrays, found NaN or infinity in it")
    return record_of(start + layer.encode(change), layout, before)
