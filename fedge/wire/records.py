"""Messages of Flower apps as bytes: a header in protobuf, and behind it the arrays' data, which are not copied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError

from fedge.errors import LimitError, RemoteProtocolError
from fedge.records import (
    AppError,
    AppMessage,
    ArrayRecord,
    Buffer,
    ConfigRecord,
    Content,
    MetricRecord,
    RawArray,
    Record,
)
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import MAX_MESSAGE_BYTES, check_size

MAX_AXES: Final = 64
MAX_ENTRIES: Final = 1 << 16
"""Records, arrays and values of one message."""

_MAX_TEXT: Final = 1 << 12
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1

_LISTS: Final[Mapping[type, str]] = {
    bool: "flags",
    int: "integers",
    float: "reals",
    str: "texts",
    bytes: "datas",
}
_SCALARS: Final[Mapping[type, str]] = {
    bool: "flag",
    int: "integer",
    float: "real",
    str: "text",
    bytes: "data",
}


def encode(message: AppMessage) -> tuple[bytes, list[Buffer]]:
    """A header, and the data of the arrays that it tells of.

    Raises:
        LimitError: the header is too large.
        ValueError: a value is of no type that a record may hold, or an integer has more than 64 bits.
    """
    header = pb.AppMessage(
        id=message.id,
        kind=message.kind,
        node=message.node,
        src=message.src,
        group=message.group,
        reply_to=message.reply_to,
        created_at=message.created_at,
        ttl=message.ttl,
    )
    buffers: list[Buffer] = []
    _check_entries(message.content)
    if isinstance(message.content, AppError):
        header.error.CopyFrom(pb.AppError(code=message.content.code, reason=message.content.reason))
    else:
        header.content.SetInParent()
        for name, record in message.content.items():
            _encode_record(header.content.records.add(name=name), record, buffers)
    check_size("a message's records without their arrays", header.ByteSize(), MAX_MESSAGE_BYTES)
    return header.SerializeToString(), buffers


def decode(header: bytes, body: memoryview) -> AppMessage:
    """The message of this header; its arrays are views of `body`, which has nothing else.

    Raises:
        RemoteProtocolError: it is none, or header and body do not go together.
        LimitError: there is more of something than a message may have.
    """
    check_size("a message's records without their arrays", len(header), MAX_MESSAGE_BYTES)
    try:
        found = pb.AppMessage.FromString(header)
    except DecodeError:
        raise RemoteProtocolError("expected an app's message, found bytes that are none") from None
    for what, text in (
        ("id", found.id),
        ("kind", found.kind),
        ("group", found.group),
        ("reply_to", found.reply_to),
    ):
        check_size(f"a message's {what}", len(text.encode()), _MAX_TEXT)
    if not (math.isfinite(found.created_at) and math.isfinite(found.ttl)):
        raise RemoteProtocolError("expected times of a message that are numbers")
    content: Content | AppError
    match found.WhichOneof("body"):
        case "content":
            content = _decode_content(found.content, body)
        case "error" if not len(body):
            content = AppError(found.error.code, found.error.reason)
        case other:
            raise RemoteProtocolError(f"expected records, or an error without any, found {other}")
    return AppMessage(
        found.id,
        found.kind,
        found.node,
        content,
        found.group,
        found.reply_to,
        found.created_at,
        found.ttl,
        found.src,
    )


def _check_entries(content: Content | AppError) -> None:
    """
    Raises:
        LimitError: there are more than a message may have.
    """
    if isinstance(content, AppError):
        return
    entries = len(content) + sum(map(_length, content.values()))
    if entries > MAX_ENTRIES:
        raise LimitError(
            f"expected at most {MAX_ENTRIES} records, arrays and values in a message, found {entries}"
        )


def _length(record: Record) -> int:
    match record:
        case ArrayRecord(values) | MetricRecord(values) | ConfigRecord(values):
            return len(values)


def _encode_record(into: pb.AppRecord, record: Record, buffers: list[Buffer]) -> None:
    match record:
        case ArrayRecord(arrays):
            into.arrays.SetInParent()
            for name, array in arrays.items():
                into.arrays.arrays.add(
                    name=name, dtype=array.dtype, shape=array.shape, stype=array.stype, size=array.nbytes
                )
                buffers.append(array.data)
        case MetricRecord(values):
            into.metrics.SetInParent()
            _encode_values(into.metrics, values)
        case ConfigRecord(values):
            into.configs.SetInParent()
            _encode_values(into.configs, values)


def _encode_values(into: pb.AppValues, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        found = into.values.add(name=name)
        if isinstance(value, list):
            kinds = {type(each) for each in value} or {int}
            kind = kinds.pop()
            if kinds or kind not in _LISTS:
                raise ValueError(f"{name}: expected a list of numbers, texts or bytes, of one type")
            if kind is int:
                _check_integers(name, value)
            field = getattr(found, _LISTS[kind])
            field.SetInParent()
            field.values.extend(value)
        elif type(value) in _SCALARS:
            if type(value) is int:
                _check_integers(name, [value])
            setattr(found, _SCALARS[type(value)], value)
        else:
            raise ValueError(f"{name}: expected a number, a text or bytes, found a {type(value).__name__}")


def _check_integers(name: str, values: Iterable[int]) -> None:
    if not all(_LEAST <= value <= _MOST for value in values):
        raise ValueError(f"{name}: expected integers of 64 bits, found a larger one")


def _decode_content(found: pb.AppContent, body: memoryview) -> Content:
    entries = len(found.records) + sum(
        len(record.arrays.arrays) + len(record.metrics.values) + len(record.configs.values)
        for record in found.records
    )
    if entries > MAX_ENTRIES:
        raise LimitError(f"expected at most {MAX_ENTRIES} records, arrays and values, found {entries}")
    sizes = [array.size for record in found.records for array in record.arrays.arrays]
    if sum(sizes) != len(body):
        raise RemoteProtocolError(f"expected {sum(sizes)} bytes of arrays, found {len(body)}")
    ends = 0
    content: dict[str, Record] = {}
    for record in found.records:
        if record.name in content:
            raise RemoteProtocolError(f"expected each record once, found {record.name[:80]!r} again")
        match record.WhichOneof("kind"):
            case "arrays":
                arrays = {}
                for array in record.arrays.arrays:
                    arrays[array.name] = _decode_array(array, body[ends : ends + array.size])
                    ends += array.size
                content[record.name] = ArrayRecord(_all_of(arrays, record.arrays.arrays))
            case "metrics":
                content[record.name] = MetricRecord(_decode_values(record.metrics, metrics=True))
            case "configs":
                content[record.name] = ConfigRecord(_decode_values(record.configs, metrics=False))
            case other:
                raise RemoteProtocolError(f"expected arrays, metrics or configs, found {other}")
    return content


def _decode_array(found: pb.AppArray, data: memoryview) -> RawArray:
    if len(found.shape) > MAX_AXES:
        raise LimitError(f"expected an array of at most {MAX_AXES} axes, found {len(found.shape)}")
    try:
        return RawArray(found.dtype, tuple(found.shape), data, found.stype)
    except ValueError as error:
        raise RemoteProtocolError(f"array {found.name[:80]!r}: {error}") from None


def _decode_values(found: pb.AppValues, *, metrics: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for each in found.values:
        kind = each.WhichOneof("kind")
        if kind is None or (metrics and kind not in ("integer", "real", "integers", "reals")):
            raise RemoteProtocolError(f"expected a value of a known type, found {kind}")
        value = getattr(each, kind)
        values[each.name] = value if kind in _SCALARS.values() else list(value.values)
    return _all_of(values, found.values)


def _all_of(found: dict[str, Any], entries: Iterable[Any]) -> dict[str, Any]:
    if len(found) != sum(1 for _ in entries):
        raise RemoteProtocolError("expected each name once in a record, found one twice")
    return found
