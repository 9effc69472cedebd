"""Mods that bound or shorten what a ClientApp returns. They are of the app's own code: in a native run the gate is the
site's."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message

from fedge.pipeline import Clip
from fedge_flower import quantised
from fedge_flower.asked import Asked
from fedge_flower.layouts import record_of

ClientAppCall = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCall], Message]


def clip(max_norm: float) -> Mod:
    """A mod that scales what a node's training has changed down to an L2 norm of `max_norm`, all floating-point arrays
    together, in float32; shorter changes pass as they are. Where gradients are asked for, they are what is scaled, with
    the change of what the ServerApp names as buffers.

    Arrays of other types go back as they were sent. Messages whose replies have no arrays pass. A reply that has other
    arrays than the message, or NaN or infinity in them, becomes an error: ValueError, and nothing of it leaves.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    layer = Clip(max_norm)

    def mod(message: Message, context: Context, call_next: ClientAppCall) -> Message:
        asked = Asked.by(message.content)
        reply = call_next(message, context)
        if not reply.has_error():
            for name, sent, change in asked.changes(reply.content):
                clipped = sent.start + layer.encode(change)
                reply.content[name] = record_of(clipped, sent.layout, sent.arrays)
        return reply

    return mod


def quantise() -> Mod:
    """A mod that sends what a node's training has changed as int8, a quarter of float32, with a scale for each array.
    Each number is off by less than 1/127 of its array's largest change, and right on average.

    For ServerApps that expect it: `fedge_strategies.flower.InFlower`, or any strategy of Flower's in
    `fedge_strategies.flower.Dequantised`. Others find a record more than they know, and say so. It is the first of the
    ClientApp's mods, which Flower calls around the others: `mods=[quantise(), clip(1.0)]`.

    Arrays of other types do not go back. What becomes an error does as in `clip`.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCall) -> Message:
        asked = Asked.by(message.content)
        drawn = random.getrandbits(64)  # nothing is hidden by rounding
        reply = call_next(message, context)
        if not reply.has_error():
            for name, sent, change in asked.changes(reply.content):
                # Apps begin their generators anew at each message, all nodes alike: then the drawn bits are the same.
                rng = np.random.default_rng([drawn, context.node_id, zlib.crc32(change.data)])
                quantised.put(reply.content, name, change, sent.layout, rng)
        return reply

    return mod
