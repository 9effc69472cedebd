"""What somebody and a process that runs ClientApps say to each other: JSON, and messages whose bytes are not copied."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from fedge.records import Buffer
from fedge.wire import fedge_pb2 as pb
from fedge.wire.records import Packed, decode, encode

_SIZES = struct.Struct("<QQ")
_LOOK_MS: Final = 500


def room(size: int) -> memoryview:
    """New memory of so many bytes; numpy asks for large pages, of which there are few to clear."""
    return np.empty(size, np.uint8).data


class Frames:
    """One end of a socket between two processes of one machine. Neither end reads sizes from anybody else."""

    def __init__(self, end: socket.socket, *, is_there: Callable[[], bool] = lambda: True) -> None:
        """`is_there`: whether there is still somebody at the other end, which another process may hold open."""
        self._end, self._is_there = end, is_there
        self._arrivals = select.poll()
        self._arrivals.register(end, select.POLLIN)

    def tell(self, told: Mapping[str, Any]) -> None:
        """
        Raises:
            OSError: the other end is gone.
        """
        self._send(json.dumps(told).encode())

    def hear(self) -> dict[str, Any]:
        """
        Raises:
            EOFError: the other end is gone.
        """
        told: dict[str, Any] = json.loads(self._receive()[0])
        return told

    def send(self, packed: Packed) -> None:
        """
        Raises:
            OSError: the other end is gone.
        """
        self._send(encode(packed.about).SerializeToString(), packed.payload)

    def receive(self) -> Packed:
        """A message, its payload in one piece.

        Raises:
            EOFError: the other end is gone.
        """
        about, payload = self._receive()
        return Packed(decode(pb.AppMessage.FromString(about)), (payload,))

    def send_bytes(self, parts: Sequence[Buffer]) -> None:
        """
        Raises:
            OSError: the other end is gone.
        """
        self._send(b"", parts)

    def receive_bytes(self) -> memoryview:
        """
        Raises:
            EOFError: the other end is gone.
        """
        return self._receive()[1]

    def _send(self, header: bytes, parts: Sequence[Buffer] = ()) -> None:
        views = [memoryview(each).cast("B") for each in parts if memoryview(each).nbytes]
        self._end.sendall(_SIZES.pack(len(header), sum(map(len, views))) + header)
        for view in views:
            self._end.sendall(view)

    def _receive(self) -> tuple[bytes, memoryview]:
        head, size = _SIZES.unpack(self._read(_SIZES.size))
        return bytes(self._read(head)), self._read(size)

    def _read(self, size: int) -> memoryview:
        whole = room(size)
        at = 0
        while at < size:
            try:
                if not self._arrivals.poll(_LOOK_MS):
                    if self._is_there():
                        continue
                    raise EOFError
                got = self._end.recv_into(whole[at:])
            except OSError:  # it was closed, here or there
                got = 0
            if not got:
                raise EOFError
            at += got
        return whole
