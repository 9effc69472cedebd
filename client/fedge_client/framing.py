"""Length-prefixed protobuf messages on the socket pair between agent and worker."""

from __future__ import annotations

import struct

from fedge.errors import LimitError
from fedge.wire.limits import MAX_MESSAGE_BYTES

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES + (1 << 16)


def frame(payload: bytes) -> bytes:
    """A message with its length in front."""
    return HEADER.pack(check_length(len(payload))) + payload


def check_length(length: int) -> int:
    """Return a frame's length if it is acceptable; it is checked before room is made.

    Raises:
        LimitError: it is larger than the cap.
    """
    if length > MAX_FRAME_BYTES:
        raise LimitError(f"expected a frame of at most {MAX_FRAME_BYTES} bytes, found {length}")
    return length
