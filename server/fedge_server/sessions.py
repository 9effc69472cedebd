"""Connected sites: one session each, with a bounded queue of what is to be sent to it."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator

from fedge.errors import RemoteProtocolError
from fedge.principal import Principal
from fedge.wire import fedge_pb2 as pb

MAX_QUEUED_MESSAGES = 1024
BATCH_BYTES = 1 << 20
LAZY_S = 0.02
_serials = itertools.count(1)


class Session:
    """One site's live stream. Messages are queued without waiting; a reader that lags is cut off."""

    def __init__(self, principal: Principal) -> None:
        self.site = principal.name
        self.principal = principal
        self.number = next(_serials)
        self.since = asyncio.get_running_loop().time()
        self.joined: set[str] = set()
        """Runs that this session has accepted."""
        self.ended_because = ""
        self.error: RemoteProtocolError | None = None
        """How the site broke the protocol; its stream then ends with the status that says so."""
        self.closed = False
        self._queue: deque[pb.ServerMessage] = deque()
        self._news = asyncio.Event()

    def send(self, message: pb.ServerMessage, *, lazily: bool = False) -> None:
        """Queue a message; a full queue closes the session.

        `lazily`: it may wait a moment for company, since nobody waits for it. A receipt of an accepted
        update then rides with the next order, and a short round costs one write instead of two.
        """
        if self.closed:
            return
        if len(self._queue) == MAX_QUEUED_MESSAGES:
            self.close(f"{MAX_QUEUED_MESSAGES} messages were waiting to be read")
            return
        self._queue.append(message)
        if not lazily:
            self._news.set()
        elif len(self._queue) == 1:
            asyncio.get_running_loop().call_later(LAZY_S, self._news.set)

    def close(self, because: str, *, replaced: bool = False, retry_after_s: float = 0.0) -> None:
        """End the session; what is queued, and then the reason, is still sent if the peer reads.

        `retry_after_s` is when the site should come back; 0 leaves that to it.
        """
        if not self.closed:
            closing = pb.Closing(reason=because, replaced=replaced, retry_after_s=retry_after_s)
            self._queue.append(pb.ServerMessage(closing=closing))
            self.closed = True
            self.ended_because = because
            self._news.set()

    async def outgoing(self) -> AsyncIterator[list[pb.ServerMessage]]:
        """Messages as they are queued, those together that are ready together, until the session is closed."""
        while True:
            while self._queue:
                yield self._batch()
            if self.closed:
                return
            self._news.clear()
            await self._news.wait()

    def _batch(self) -> list[pb.ServerMessage]:
        batch = [self._queue.popleft()]
        size = batch[0].ByteSize()
        while self._queue and (size := size + self._queue[0].ByteSize()) <= BATCH_BYTES:
            batch.append(self._queue.popleft())
        return batch
