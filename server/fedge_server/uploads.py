"""Uploads that are under way, and those that were cut off: each goes on where it was, in another call.

One upload for each site and order. What has arrived whole, chunk by chunk, stays when a call breaks; the
next call asks how much that is (`resume`) and goes on there. Whoever has a part and does not come back for
it loses it when room is needed, when its run is over or when an hour has passed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from fedge.errors import FedgeError, LinkError, RefusedError, RemoteProtocolError
from fedge.round import OrderId
from fedge.wire.chunks import Piece
from fedge_server.spool import Spool, Upload

FORGOTTEN_S: Final = 3600.0
_ON_LOOP_BYTES: Final = 128 << 10

Key = tuple[str, str, OrderId]
"""Site, run and order."""


@dataclass(eq=False, slots=True)
class Incoming:
    """An upload and the call that feeds it. At most one chunk of it is being written at a time."""

    key: Key
    upload: Upload
    stopped: bool = False
    writing: asyncio.Task[None] | None = field(default=None, repr=False)

    async def write(self, data: Piece) -> None:
        """Begin to keep a chunk, once the one before is kept.

        Raises:
            LinkError: another call goes on with this upload.
            RefusedError, StorageError: as `Upload.write`, for this chunk or the one before.
        """
        await self.settle()
        if self.stopped:
            raise LinkError("another call goes on with this upload")
        if len(data) <= _ON_LOOP_BYTES:
            self.upload.write(data)
        else:
            self.writing = asyncio.create_task(asyncio.to_thread(self.upload.write, data))

    async def settle(self) -> None:
        """Wait until everything that was given is kept; raises as `write`."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            await asyncio.shield(writing)

    async def stop(self) -> None:
        """No other chunk will be taken by the call that feeds it."""
        self.stopped = True
        if self.writing is not None:
            with suppress(FedgeError):
                await asyncio.shield(self.writing)


class Uploads:
    """All of a coordinator's uploads. Its methods belong to the event loop's thread."""

    def __init__(self, spool: Spool, *, max_idle_bytes: int) -> None:
        self._spool = spool
        self._max_idle_bytes = max_idle_bytes
        self._active: dict[Key, Incoming] = {}
        self._idle: dict[Key, tuple[float, Upload]] = {}
        """Parts that nobody feeds now, the longest forgotten first, and since when."""

    @contextmanager
    def receiving(
        self, site: str, run_id: str, order: OrderId, *, size: int, digest: bytes, offset: int
    ) -> Iterator[Incoming]:
        """Room for an upload, or for the rest of it. If the block fails for the link's sake, its part stays.

        Raises:
            RemoteProtocolError: `offset` is not where what has arrived ends.
        """
        key = (site, run_id, order)
        incoming = Incoming(key, self._begin(key, size=size, digest=digest, offset=offset))
        self._active[key] = incoming
        try:
            yield incoming
        except RefusedError:
            self._drop(incoming)
            raise
        except BaseException:
            self._put_aside(incoming)
            raise
        else:
            if self._active.get(key) is incoming:
                del self._active[key]

    async def resume(self, site: str, run_id: str, order: OrderId, digest: bytes) -> int:
        """How many bytes of an upload are here; the call that fed it until now feeds it no more."""
        key = (site, run_id, order)
        active = self._active.get(key)
        if active is not None:
            await active.stop()
            if self._active.get(key) is active:
                self._put_aside(active)
        _, part = self._idle.get(key, (0.0, None))
        return part.size - part.missing if part is not None and part.digest == digest else 0

    def forget_run(self, run_id: str) -> None:
        """The run is over: nobody will come back for its parts."""
        for key in [key for key in self._idle if key[1] == run_id]:
            self._idle.pop(key)[1].close()

    def _begin(self, key: Key, *, size: int, digest: bytes, offset: int) -> Upload:
        active = self._active.pop(key, None)
        if active is not None:
            active.stopped = True
            if active.writing is None:
                self._keep_part(key, active.upload)
            else:  # its end is not known yet: whoever wants to go on there asks first
                active.upload.close()
        _, part = self._idle.pop(key, (0.0, None))
        if not offset:
            if part is not None:
                part.close()
            return self._spool.upload(size=size, digest=digest)
        received = part.size - part.missing if part is not None else 0
        if part is None or part.digest != digest or received != offset:
            if part is not None:
                part.close()
            raise RemoteProtocolError(f"expected bytes from {received} on, found them from {offset} on")
        return part

    def _put_aside(self, incoming: Incoming) -> None:
        """Keep what has arrived, unless another call has it by now."""
        if self._active.get(incoming.key) is not incoming:
            return
        del self._active[incoming.key]
        incoming.stopped = True
        if incoming.writing is not None:  # a chunk is being written: it is kept when that is known to be well
            incoming.writing.add_done_callback(lambda done: self._written(incoming, done))
        else:
            self._keep_part(incoming.key, incoming.upload)

    def _written(self, incoming: Incoming, done: asyncio.Task[None]) -> None:
        broken = done.cancelled() or done.exception() is not None
        if broken or incoming.key in self._active or incoming.key in self._idle:
            incoming.upload.close()
        else:
            self._keep_part(incoming.key, incoming.upload)

    def _keep_part(self, key: Key, upload: Upload) -> None:
        if upload.closed or not upload.missing or upload.missing == upload.size:
            upload.close()
            return
        now = asyncio.get_running_loop().time()
        self._idle.pop(key, None)
        self._idle[key] = (now, upload)
        in_all = sum(part.size for _, part in self._idle.values())
        for other, (since, part) in list(self._idle.items()):
            if in_all <= self._max_idle_bytes and now - since <= FORGOTTEN_S:
                break
            in_all -= part.size
            del self._idle[other]
            part.close()

    def _drop(self, incoming: Incoming) -> None:
        if self._active.get(incoming.key) is incoming:
            del self._active[incoming.key]
        incoming.upload.close()
