"""What was agreed for a run, and what an order asks, as 32 bytes: in a layout that does not depend on protobuf.

Encoders of protobuf may differ in what they leave out and in which order they write; what is signed must not.
"""

from __future__ import annotations

import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fedge.secagg.canonical import Field, digest
from fedge.wire import fedge_pb2 as pb


def offer_digest(offer: pb.Offer) -> bytes:
    """The digest of all that an offer says, field by field: the same for both ends."""
    return digest("offer", _message(offer))


def order_digest(order: pb.Order) -> bytes:
    """The digest of what an order asks to be done: on which model, with which clip and which control variate."""
    clip = struct.pack("<d", order.clip) if order.HasField("clip") else b""
    control = [order.control.variate.digest] if order.control.HasField("variate") else []
    return digest("order", order.model.digest, clip, *control)


def _message(message: Message) -> bytes:
    """Each field that is there, by its number: how many values it has, and each of them."""
    parts: list[Field] = []
    for field in sorted(message.DESCRIPTOR.fields, key=lambda each: each.number):
        value = getattr(message, field.name)
        if field.is_repeated:
            values = list(value)
        else:
            values = [value] if not field.has_presence or message.HasField(field.name) else []
        parts += [field.number, len(values), *(_value(field, each) for each in values)]
    return digest("message", *parts)


def _value(field: FieldDescriptor, value: Any) -> Field:
    if isinstance(value, Message):
        return _message(value)
    if isinstance(value, float):
        return struct.pack("<d", value)
    assert isinstance(value, int | str | bytes)  # whatever else the wire format has
    return value
