"""Bulk messages without copies: a chunk's bytes are put into and taken out of its frame directly.

On the wire these are ordinary messages of fedge.proto (`Chunk`, `DeliverRequest`, `AppRequest`, `AppEvent`); protobuf's
own objects would copy each chunk twice more on each side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fedge.errors import RemoteProtocolError
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import CHUNK_BYTES

_CHUNK_TAG = 0x0A  # Chunk.data: field 1, length-delimited
_DELIVER_TAG = 0x12  # DeliverRequest.data: field 2, length-delimited
_APP_REQUEST_TAG = 0x1A  # AppRequest.data: field 3, length-delimited
_APP_EVENT_TAG = 0x22  # AppEvent.data: field 4, length-delimited

Piece = bytes | memoryview
M = TypeVar("M", pb.Chunk, pb.DeliverRequest)
A = TypeVar("A", pb.AppRequest, pb.AppEvent)


def frames(
    view: memoryview, *, offset: int = 0, deliver: bool = False, size: int | None = None
) -> Iterator[bytes]:
    """Encoded messages that carry `view[offset:]`, `size` bytes (CHUNK_BYTES unless given) each: Chunks, or the data of
    DeliverRequests."""
    tag, size = _DELIVER_TAG if deliver else _CHUNK_TAG, size or CHUNK_BYTES
    for start in range(offset, len(view), size):
        yield frame(view[start : start + size], tag=tag)


def frame(piece: Piece, *, tag: int = _CHUNK_TAG) -> bytes:
    """One encoded message that carries these bytes: a Chunk."""
    return b"".join((bytes((tag,)), _varint(len(piece)), piece))


def app_request(piece: Piece) -> bytes:
    """An encoded AppRequest that carries these bytes."""
    return frame(piece, tag=_APP_REQUEST_TAG)


def app_event(piece: Piece) -> bytes:
    """An encoded AppEvent that carries these bytes."""
    return frame(piece, tag=_APP_EVENT_TAG)


def encoded(message: Message | bytes) -> bytes:
    """For gRPC: what is encoded already stays as it is."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def open_app_request(message: bytes) -> pb.AppRequest | Piece | None:
    """For gRPC: an AppRequest, or the bytes that one carries; None if it is none."""
    return _opened(pb.AppRequest, message, _APP_REQUEST_TAG)


def open_app_event(message: bytes) -> pb.AppEvent | Piece | None:
    """For gRPC: an AppEvent, or the bytes that one carries; None if it is none."""
    return _opened(pb.AppEvent, message, _APP_EVENT_TAG)


def _opened(kind: type[A], message: bytes, tag: int) -> A | Piece | None:
    """An exception here would be gRPC's to log, with a traceback for each message that a peer cares to send."""
    if (data := _data(message, tag)) is not None:
        return data
    try:
        found = kind.FromString(message)
    except DecodeError:
        return None
    return found.data if found.WhichOneof("kind") == "data" else found


def data_of_chunk(message: bytes) -> Piece:
    """The bytes that an encoded Chunk carries.

    Raises:
        RemoteProtocolError: it is not one.
    """
    data = _data(message, _CHUNK_TAG)
    return data if data is not None else _parse(pb.Chunk, message).data


def open_deliver_request(message: bytes) -> pb.DeliverRequest | Piece:
    """What an encoded DeliverRequest carries: an update's description, or bytes of its vector.

    Raises:
        RemoteProtocolError: it is not one, or is empty.
    """
    data = _data(message, _DELIVER_TAG)
    if data is not None:
        return data
    request = _parse(pb.DeliverRequest, message)
    match request.WhichOneof("kind"):
        case "update" | "reply":
            return request
        case "data":
            return request.data
        case other:
            raise RemoteProtocolError(f"expected an update or its bytes, found {other}")


def _data(message: bytes, tag: int) -> memoryview | None:
    """The payload, if the message is exactly one field of this tag; None leaves it to protobuf."""
    if not message or message[0] != tag:
        return None
    length = shift = 0
    for at in range(1, min(len(message), 6)):
        length |= (message[at] & 0x7F) << shift
        shift += 7
        if not message[at] & 0x80:
            return memoryview(message)[at + 1 :] if len(message) == at + 1 + length else None
    return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _parse(kind: type[M], message: bytes) -> M:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise RemoteProtocolError(f"expected a {kind.__name__}, found bytes that are not one") from None
