"""Every size that a peer may choose, and its cap. Checked before anything is parsed or allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedge.errors import LimitError

PROTOCOL = 1
"""The version of the wire format; peers of different versions refuse each other."""

CHUNK_BYTES = 256 << 10
"""Bytes of a chunk: a multiple of an element's four. What a link that breaks may cost, and what each upload holds."""

APP_CHUNK_BYTES = 1 << 20
"""As that, of what messages of Flower apps carry: of which there are few on their way at once, as of updates not, and
each of whose chunks costs some time whatever its size."""

MAX_MESSAGE_BYTES = 16 << 20
"""What gRPC accepts as one message: the largest is an offer, with a layout of many tensors."""

MAX_SMALL_BYTES = 1 << 20
"""What a site's other messages may measure: its shares for 255 others under suite 2 are the largest of them."""

INLINE_BYTES = 64 << 10
"""Vectors up to this size ride in the order or the update: a round is then one exchange."""

MAX_METRICS = 64
MAX_NAME_BYTES = 256
MAX_TEXT_BYTES = 2048
MAX_DEADLINE_S = 30 * 24 * 3600.0

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps that an operator or a site's owner may set."""

    max_model_bytes: int = 4 << 30

    def check_model(self, size: int) -> int:
        """Return `size` if a vector of so many bytes is acceptable.

        Raises:
            LimitError: it is larger than the cap.
        """
        return check_size("a vector", size, self.max_model_bytes)


def check_size(what: str, size: int, cap: int) -> int:
    """Return `size`, or raise a LimitError that names both numbers."""
    if size > cap:
        raise LimitError(f"expected {what} of at most {cap} bytes, found {size}")
    return size


def check_text(what: str, text: str, *, cap: int = MAX_NAME_BYTES) -> str:
    """Return `text` if it is short enough, printable and not empty.

    Raises:
        LimitError: it is not.
    """
    if not text or len(text.encode()) > cap or not text.isprintable():
        raise LimitError(f"expected {what} of 1 to {cap} printable bytes, found {len(text.encode())} bytes")
    return text
