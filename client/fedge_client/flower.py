"""What a Flower client may be wrapped in: mods that bound what its ClientApp returns. Needs flwr.

    app = ClientApp(mods=[clip(1.0)])

A mod is of the app's own code: a site that wants to be sure uses a native run, where the gate is the site's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message

from fedge.pipeline import Clip
from fedge.vector import FLOATS, Layout, Tensor, all_finite

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
    layout = Layout.of(
        Tensor(name, tuple(each.shape), each.dtype) for name, each in before.items() if each.dtype in FLOATS
    )
    start = layout.flatten({tensor.name: before[tensor.name].numpy() for tensor in layout.tensors})
    end = layout.flatten({tensor.name: after[tensor.name].numpy() for tensor in layout.tensors})
    change = end - start
    if not all_finite(change):
        raise ValueError("expected a finite change of the arrays, found NaN or infinity in it")
    views = layout.views(start + layer.encode(change))
    record = ArrayRecord()
    for name, each in before.items():
        record[name] = Array(views[name].astype(np.dtype(each.dtype))) if name in views else each
    return record
