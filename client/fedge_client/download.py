"""A vector on its way to this site: what has arrived stays, and the next call goes on behind it."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from fedge.errors import RemoteProtocolError
from fedge.vector import bytes_of, new_digest
from fedge.wire import fedge_pb2 as pb
from fedge.wire.chunks import Piece
from fedge.wire.codec import check_blob


class Download:
    """Fills `out`, an array of exactly the blob's size, in order.

    Raises RemoteProtocolError if the blob is not of that size, or if its own bytes do not have its digest.
    """

    def __init__(self, blob: pb.Blob, out: npt.NDArray[Any]) -> None:
        check_blob(blob, expected_bytes=out.nbytes)
        self.digest = blob.digest
        self.out = out
        self.received = 0
        self._room = bytes_of(out)
        self._hash = new_digest()
        if blob.HasField("inline"):
            self._room[:] = blob.inline
            self.received = len(self._room)

    @property
    def complete(self) -> bool:
        return self.received == len(self._room)

    def take(self, data: Piece) -> None:
        """Keep the next bytes.

        Raises:
            RemoteProtocolError: they are more than was announced.
        """
        end = self.received + len(data)
        if end > len(self._room):
            raise RemoteProtocolError(f"expected {len(self._room)} bytes, found more")
        self._room[self.received : end] = data
        self._hash.update(data)
        self.received = end

    def check(self) -> None:
        """What came in chunks is all here and is what was announced.

        Raises:
            RemoteProtocolError: it is too short, or has another digest.
        """
        if not self.complete or self._hash.digest() != self.digest:
            raise RemoteProtocolError(
                f"expected {len(self._room)} bytes of the announced digest, found others"
            )
