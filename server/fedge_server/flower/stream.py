"""What a ServerApp's process says to its coordinator, as one stream: contents that several messages share go once."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedge.records import Buffer
from fedge.wire import fedge_pb2 as pb
from fedge.wire.chunks import app_request
from fedge.wire.limits import APP_CHUNK_BYTES
from fedge.wire.records import Packed, encode

MAX_TOGETHER: Final = 4096
"""Messages in one send: some hundred bytes each."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Messages of one content."""

    messages: Sequence[Packed]
    blob: pb.Blob | None

    def requests(self) -> Iterator[pb.AppRequest | bytes]:
        """As they go over the stream, the content encoded."""
        messages = [encode(each.about) for each in self.messages]
        yield pb.AppRequest(send=pb.AppSend(messages=messages, content=self.blob))
        if self.blob is not None and not self.blob.HasField("inline"):
            for part in self.messages[0].payload:
                view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
                for start in range(0, len(view), APP_CHUNK_BYTES):
                    yield app_request(view[start : start + APP_CHUNK_BYTES])


def bundled(messages: Iterable[Packed]) -> list[Bundle]:
    """Messages by their contents, in the order of the first of each."""
    groups: dict[object, list[Packed]] = {}
    for each in messages:
        groups.setdefault(_sameness(each.payload), []).append(each)
    found = []
    for group in groups.values():
        blob = group[0].blob()
        found += [Bundle(group[at : at + MAX_TOGETHER], blob) for at in range(0, len(group), MAX_TOGETHER)]
    return found


class Requests:
    """The requests of one stream, in the order in which any thread puts them."""

    def __init__(self, first: pb.AppRequest) -> None:
        self._queue: queue.SimpleQueue[pb.AppRequest | Bundle | None] = queue.SimpleQueue()
        self._queue.put(first)

    def put(self, request: pb.AppRequest | Bundle) -> None:
        self._queue.put(request)

    def end(self) -> None:
        """That was all; what is queued still goes."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[pb.AppRequest | bytes]:
        while (found := self._queue.get()) is not None:
            if isinstance(found, Bundle):
                yield from found.requests()
            else:
                yield found


def _sameness(payload: Sequence[Buffer]) -> object:
    """The same for payloads whose arrays are the same memory, and whose headers say the same of them."""
    header, *arrays = payload
    return bytes(header), tuple(_place(memoryview(each)) for each in arrays)


def _place(view: memoryview) -> tuple[int, int]:
    """Where in memory that is, and how much of it."""
    return (np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else 0), view.nbytes
