"""Connected sites: one session each, with a bounded queue of what is to be sent to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

from fedge.errors import RemoteProtocolError
from fedge.principal import Principal
from fedge.wire import fedge_pb2 as pb

MAX_QUEUED_MESSAGES = 1024
_serials = itertools.count(1)


class Session:
    """One site's live stream. Messages are queued without waiting; a reader that lags is cut off."""

    def __init__(self, principal: Principal) -> None:
        self.site = principal.name
        self.principal = principal
        self.number = next(_serials)
        self.joined: set[str] = set()
        """Runs that this session has accepted."""
        self.ended_because = ""
        self.error: RemoteProtocolError | None = None
        """How the site broke the protocol; its stream then ends with the status that says so."""
        self._queue: asyncio.Queue[pb.ServerMessage] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        self._closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def send(self, message: pb.ServerMessage) -> None:
        """Queue a message; a full queue closes the session."""
        if self.closed:
            return
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.close(f"{MAX_QUEUED_MESSAGES} messages were waiting to be read")

    def close(self, because: str) -> None:
        """End the session; what is queued is still sent if the peer reads."""
        if not self.closed:
            self.ended_because = because
            self._closed.set()

    async def outgoing(self) -> AsyncIterator[pb.ServerMessage]:
        """Messages as they are queued, until the session is closed."""
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            while True:
                while not self._queue.empty():
                    yield self._queue.get_nowait()
                if self.closed:
                    return
                item = asyncio.ensure_future(self._queue.get())
                try:
                    await asyncio.wait({item, closed}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not item.done():
                        item.cancel()
                if item.done() and not item.cancelled():
                    yield item.result()
        finally:
            closed.cancel()
