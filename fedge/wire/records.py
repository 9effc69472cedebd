"""Messages of Flower apps as bytes: records in protobuf, and behind them the arrays' data, which are not copied."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from fedge.vector import new_digest
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import INLINE_BYTES, MAX_MESSAGE_BYTES, check_size

MAX_AXES: Final = 64
MAX_ENTRIES: Final = 1 << 16
"""Records, arrays and values of one message."""

_LENGTH: Final = struct.Struct("<I")
_MAX_TEXT: Final = 1 << 12
_MAX_REASON: Final = 1 << 16
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


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A message as it travels: all `about` it but its content, and that as bytes, of which none is copied.

    The content of `about` is an error or empty; `payload` is an AppContent, as fedge.proto has it.
    """

    about: AppMessage
    payload: Sequence[Buffer] = ()

    @classmethod
    def of(cls, message: AppMessage) -> Packed:
        """
        Raises:
            LimitError: there is more in it than a message may have.
            ValueError: a value is of no type that a record may hold, or an integer has more than 64 bits.
        """
        if isinstance(message.content, AppError):
            return cls(message)
        return cls(replace(message, content={}), pack(message.content))

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return sum(memoryview(each).nbytes for each in self.payload)

    def blob(self) -> pb.Blob | None:
        """What is said of the payload, which rides inline if it is small; None for an error, which has none."""
        if isinstance(self.about.content, AppError):
            return None
        digest = new_digest()
        for part in self.payload:
            digest.update(part)
        inline = b"".join(self.payload) if self.size <= INLINE_BYTES else None
        return pb.Blob(digest=digest.digest(), size=self.size, inline=inline)

    def unpacked(self) -> AppMessage:
        """The message with its content; its arrays are views of the payload, which has to be in one piece.

        Raises:
            RemoteProtocolError: it is none.
            LimitError: there is more of something than a message may have.
        """
        if isinstance(self.about.content, AppError):
            return self.about
        (payload,) = self.payload
        return replace(self.about, content=unpack(memoryview(payload)))


def pack(content: Content) -> list[Buffer]:
    """Records as bytes, in parts; raises as `Packed.of`."""
    _check_entries(content)
    header, buffers = pb.AppContent(), list[Buffer]()
    for name, record in content.items():
        _encode_record(header.records.add(name=name), record, buffers)
    size = check_size("a message's records without their arrays", header.ByteSize(), MAX_MESSAGE_BYTES)
    return [_LENGTH.pack(size) + header.SerializeToString(), *buffers]


def unpack(payload: memoryview) -> Content:
    """The records that these bytes are; raises as `Packed.unpacked`."""
    if len(payload) < _LENGTH.size:
        raise RemoteProtocolError(f"expected records, found {len(payload)} bytes")
    (size,) = _LENGTH.unpack_from(payload)
    check_size("a message's records without their arrays", size, MAX_MESSAGE_BYTES)
    end = _LENGTH.size + size
    if end > len(payload):
        raise RemoteProtocolError(f"expected records of {size} bytes, found {len(payload) - _LENGTH.size}")
    try:
        found = pb.AppContent.FromString(bytes(payload[_LENGTH.size : end]))
    except DecodeError:
        raise RemoteProtocolError("expected records, found bytes that are none") from None
    return _decode_content(found, payload[end:])


def encode_values(values: Mapping[str, Any]) -> pb.AppValues:
    """Settings; raises as `Packed.of`."""
    found = pb.AppValues()
    _encode_values(found, values)
    return found


def decode_values(found: pb.AppValues) -> dict[str, Any]:
    """Settings; raises as `unpack`."""
    if len(found.values) > MAX_ENTRIES:
        raise LimitError(f"expected at most {MAX_ENTRIES} values, found {len(found.values)}")
    return _decode_values(found, metrics=False)


def encode(about: AppMessage, content: pb.Blob | None = None) -> pb.AppMessage:
    """All of a message but its content, of which this is said."""
    found = pb.AppMessage(
        id=about.id,
        kind=about.kind,
        node=about.node,
        src=about.src,
        group=about.group,
        reply_to=about.reply_to,
        created_at=about.created_at,
        ttl=about.ttl,
        content=content,
    )
    if isinstance(about.content, AppError):
        found.error.CopyFrom(pb.AppError(code=about.content.code, reason=about.content.reason))
    return found


def decode(found: pb.AppMessage) -> AppMessage:
    """All of a message but its content, which is empty here, or an error.

    Raises:
        RemoteProtocolError: its times are no times.
        LimitError: a text is too long.
    """
    for what, text in (
        ("id", found.id),
        ("kind", found.kind),
        ("group", found.group),
        ("reply_to", found.reply_to),
    ):
        check_size(f"a message's {what}", len(text.encode()), _MAX_TEXT)
    if not (math.isfinite(found.created_at) and math.isfinite(found.ttl)):
        raise RemoteProtocolError("expected times of a message that are numbers")
    check_size("an error's reason", len(found.error.reason.encode()), _MAX_REASON)
    error = AppError(found.error.code, found.error.reason) if found.HasField("error") else None
    return AppMessage(
        found.id,
        found.kind,
        found.node,
        error or {},
        found.group,
        found.reply_to,
        found.created_at,
        found.ttl,
        found.src,
    )


def _check_entries(content: Content) -> None:
    """
    Raises:
        LimitError: there are more than a message may have.
    """
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
