"""Frames on the socket between agent and worker: a length, checked before room is made, and a message."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import LimitError
from fedge.wire.limits import MAX_MESSAGE_BYTES
from fedge_client.framing import HEADER, MAX_FRAME_BYTES, check_length, frame


@given(st.lists(st.binary(max_size=50)))
def test_frames_one_after_the_other_are_the_messages_again(payloads):
    stream = b"".join(frame(payload) for payload in payloads)
    found = []
    while stream:
        (length,) = HEADER.unpack(stream[: HEADER.size])
        assert check_length(length) == length
        found.append(stream[HEADER.size : HEADER.size + length])
        stream = stream[HEADER.size + length :]
    assert found == payloads


def test_the_header_is_four_bytes_little_endian_on_every_machine():
    assert frame(b"abc") == b"\x03\x00\x00\x00abc"
    assert HEADER.size == struct.calcsize("<I") == 4


def test_a_length_over_the_cap_is_refused_before_room_is_made():
    for length in (MAX_FRAME_BYTES + 1, 2**32 - 1):
        with pytest.raises(LimitError, match=f"at most {MAX_FRAME_BYTES} bytes, found {length}"):
            check_length(length)
    assert check_length(MAX_FRAME_BYTES) == MAX_FRAME_BYTES
    assert MAX_FRAME_BYTES > MAX_MESSAGE_BYTES, (
        "a layout that came over the wire fits, with what goes around it"
    )


def test_a_message_over_the_cap_is_not_framed():
    with pytest.raises(LimitError):
        frame(bytes(MAX_FRAME_BYTES + 1))
