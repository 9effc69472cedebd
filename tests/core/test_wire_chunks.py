"""Bulk messages made and read without protobuf's objects are the messages that protobuf would make and read."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedge.errors import RemoteProtocolError
from fedge.wire import chunks
from fedge.wire import fedge_pb2 as pb
from fedge.wire.chunks import (
    app_event,
    app_request,
    data_of_chunk,
    encoded,
    frames,
    open_app_event,
    open_app_request,
    open_deliver_request,
)

UPDATE = pb.DeliverRequest(update=pb.Update(run_id="run", num_examples=3))


@given(st.binary(min_size=1, max_size=300), st.integers(0, 300), st.integers(1, 200))
def test_frames_are_what_protobuf_makes_of_each_chunk(data, offset, chunk_bytes):
    """Whatever the chunk's size: its length takes one byte or two here, three in truth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
        view = memoryview(data)
        pieces = [data[at : at + chunk_bytes] for at in range(offset, len(data), chunk_bytes)]
        sent, delivered = list(frames(view, offset=offset)), list(frames(view, deliver=True))
    assert sent == [pb.Chunk(data=piece).SerializeToString() for piece in pieces]
    assert b"".join(bytes(data_of_chunk(frame)) for frame in sent) == data[offset:]
    assert [pb.DeliverRequest.FromString(frame).data for frame in delivered] == [
        bytes(open_deliver_request(frame)) for frame in delivered
    ]
    assert b"".join(bytes(open_deliver_request(frame)) for frame in delivered) == data


def test_a_full_chunk_goes_through():
    data = bytes(range(256)) * (chunks.CHUNK_BYTES // 256) + b"rest"
    first, second = frames(memoryview(data))
    assert bytes(data_of_chunk(first)) + bytes(data_of_chunk(second)) == data
    assert pb.Chunk.FromString(first).data == data[: chunks.CHUNK_BYTES]


def test_what_a_chunk_carries_is_not_copied():
    (frame,) = frames(memoryview(bytes(1000)))
    data = data_of_chunk(frame)
    assert isinstance(data, memoryview)
    assert data.obj is frame


@given(st.binary(max_size=300))
def test_contents_of_apps_are_framed_and_read_as_protobuf_does_it(data: bytes):
    assert app_request(data) == pb.AppRequest(data=data).SerializeToString()
    assert app_event(data) == pb.AppEvent(data=data).SerializeToString()
    assert open_app_request(app_request(data)) == data
    assert open_app_event(app_event(data)) == data
    # As somebody may write it who takes more bytes for a length than it needs.
    long = bytes((0x80 | len(data) & 0x7F, 0x80 | len(data) >> 7, 0))
    assert open_app_request(b"\x1a" + long + data) == data
    assert encoded(data) is data


def test_messages_of_apps_are_told_apart_from_bytes_and_from_what_is_none():
    request, event = pb.AppRequest(close=pb.AppClose(failed="x")), pb.AppEvent(nodes=pb.AppNodes(ids=[1]))
    assert open_app_request(encoded(request)) == request
    assert open_app_event(encoded(event)) == event
    assert open_app_request(b"\xff\xff") is None
    assert open_app_event(b"\x1a\x05x") is None


def test_a_description_and_bytes_are_told_apart():
    assert open_deliver_request(UPDATE.SerializeToString()) == UPDATE
    assert bytes(open_deliver_request(pb.DeliverRequest(data=b"").SerializeToString())) == b""
    assert bytes(data_of_chunk(b"")) == b"", "an empty chunk is an empty message"
    with pytest.raises(RemoteProtocolError, match="expected an update or its bytes, found None"):
        open_deliver_request(b"")


HOSTILE = st.one_of(
    st.binary(max_size=12),
    # Close to a chunk: the tag, a length of any encoding, and bytes of that length or not.
    st.builds(
        lambda tag, length, data: bytes([tag]) + length + data,
        st.sampled_from([0x0A, 0x12]),
        st.lists(st.sampled_from([0x00, 0x01, 0x03, 0x7F, 0x80, 0x83, 0xFF]), max_size=11).map(bytes),
        st.binary(max_size=6),
    ),
)


@settings(max_examples=400, deadline=None)
@given(HOSTILE)
@example(b"\x0a\x80")
@example(b"\x0a\x83\x00abc")
@example(b"\x0a\x01a\x0a\x01b")
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused_by_type(message):
    def as_protobuf(kind: Any) -> Any:
        try:
            return kind.FromString(message)
        except DecodeError:
            return None

    chunk, request = as_protobuf(pb.Chunk), as_protobuf(pb.DeliverRequest)
    if chunk is None:
        with pytest.raises(RemoteProtocolError, match="expected a Chunk"):
            data_of_chunk(message)
    else:
        assert bytes(data_of_chunk(message)) == chunk.data
    if request is None or request.WhichOneof("kind") is None:
        with pytest.raises(RemoteProtocolError):
            open_deliver_request(message)
    else:
        found = open_deliver_request(message)
        assert (found == request) if request.HasField("update") else (bytes(found) == request.data)
