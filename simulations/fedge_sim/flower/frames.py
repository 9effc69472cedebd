"""What the simulator and its ClientApp processes say to each other: a header, and bytes that are not copied."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

from fedge.records import AppMessage, Buffer
from fedge.wire import records

_SIZES = struct.Struct("<QQ")
_LOOK_MS: Final = 500


class Frames:
    """One end of a socket between two processes of one simulation. Neither end reads sizes from anybody else."""

    def __init__(self, end: socket.socket, *, is_there: Callable[[], bool] = lambda: True) -> None:
        """`is_there`: whether there is still somebody at the other end, which another process may hold open."""
        self._end, self._is_there = end, is_there
        self._arrivals = select.poll()
        self._arrivals.register(end, select.POLLIN)

    def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """
        Raises:
            OSError: the other end is gone.
        """
        views = [memoryview(each).cast("B") for each in buffers if len(memoryview(each))]
        self._end.sendall(_SIZES.pack(len(header), sum(map(len, views))) + header)
        for view in views:
            self._end.sendall(view)

    def receive(self) -> tuple[bytes, memoryview]:
        """
        Raises:
            EOFError: the other end is gone.
        """
        head, size = _SIZES.unpack(self._read(_SIZES.size))
        return bytes(self._read(head)), self._read(size)

    def receive_message(self) -> AppMessage:
        """
        Raises:
            EOFError: the other end is gone.
        """
        return records.decode(*self.receive())

    def _read(self, size: int) -> memoryview:
        whole = memoryview(bytearray(size))
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
