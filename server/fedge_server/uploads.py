"""Uploads that are under way, and those that were cut off: each goes on where it was, in another call.

One upload for each site and order. What has arrived whole, chunk by chunk, stays when a call breaks; the
next call asks how much that is (`resume`) and goes on there. Whoever has a part and does not come back for
it loses it when room is needed, when its run is over or when an hour has passed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from fedge.errors import BusyError, FedgeError, LinkError, RefusedError
from fedge.events import OrderId
from fedge.wire.chunks import Piece
from fedge_server.spool import Spool, Upload

FORGOTTEN_S: Final = 3600.0
_ON_LOOP_BYTES: Final = 128 << 10

Subject = OrderId | str
"""What an upload is of: an order's update, or the reply to an app's message, by its id."""

Key = tuple[str, str, Subject]
"""Site, run, and what it is of."""


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
            # Cancelled here, the chunk is still being written, and stays known to be.
            await asyncio.shield(self.writing)
            self.writing = None

    async def stop(self) -> bool:
        """No other chunk will be taken by the call that feeds it; returns whether all that came was well."""
        self.stopped = True
        try:
            await self.settle()
        except FedgeError:
            return False
        return not self.upload.closed

    def goes_on(self, digest: bytes, offset: int) -> bool:
        """Whether bytes from `offset` on of the vector of this digest are what comes next."""
        return self.writing is None and self.upload.digest == digest and self.received == offset

    @property
    def received(self) -> int:
        """Bytes that are kept."""
        return self.upload.size - self.upload.missing


class Uploads:
    """All of a coordinator's uploads. Its methods belong to the event loop's thread."""

    def __init__(self, spool: Spool, *, max_idle_bytes: int) -> None:
        self._spool = spool
        self._max_idle_bytes = max_idle_bytes
        self._active: dict[Key, Incoming] = {}
        self._parts: dict[Key, tuple[float, Incoming]] = {}
        """What nobody feeds now, the longest forgotten first, and since when."""

    @contextmanager
    def receiving(
        self,
        site: str,
        run_id: str,
        order: Subject,
        *,
        size: int,
        digest: bytes,
        offset: int,
        masked: bool = False,
    ) -> Iterator[Incoming]:
        """Room for an upload, or for the rest of it. If the block fails for the link's sake, its part stays.

        Raises:
            BusyError: `offset` is not where what has arrived ends (any more): whoever asks again is told.
            LinkError: another call has gone on with it meanwhile.
        """
        key = (site, run_id, order)
        upload = self._begin(key, size=size, digest=digest, offset=offset, masked=masked)
        incoming = Incoming(key, upload)
        self._active[key] = incoming
        try:
            yield incoming
        except RefusedError:
            self._drop(incoming)
            raise
        except BaseException:
            self._put_aside(incoming)
            raise
        if self._active.get(key) is not incoming:  # it has one owner: the call that goes on with it
            raise LinkError("another call goes on with this upload")
        del self._active[key]

    async def resume(self, site: str, run_id: str, order: Subject, digest: bytes) -> int:
        """How many bytes of an upload are here; the call that fed it until now feeds it no more."""
        key = (site, run_id, order)
        if key in self._active:
            self._put_aside(self._active[key])
        _, part = self._parts.get(key, (0.0, None))
        if part is None or part.upload.digest != digest:
            return 0
        well = await part.stop()
        if self._part(key) is not part:
            return 0  # another call has it by now
        if not well:
            self._forget(key)
            return 0
        return part.received

    def forget_run(self, run_id: str) -> None:
        """The run is over: nobody will come back for its parts."""
        for key in [key for key in self._parts if key[1] == run_id]:
            self._forget(key)

    def _begin(self, key: Key, *, size: int, digest: bytes, offset: int, masked: bool) -> Upload:
        if key in self._active:
            self._put_aside(self._active[key])
        part = self._part(key)
        if offset:
            if part is None or not part.goes_on(digest, offset):
                raise BusyError(f"what has arrived does not end at {offset}: ask again", retry_after_s=0.1)
            del self._parts[key]
            return part.upload
        self._forget(key)
        return self._spool.upload(size=size, digest=digest, masked=masked)

    def _part(self, key: Key) -> Incoming | None:
        return self._parts[key][1] if key in self._parts else None

    def _put_aside(self, incoming: Incoming) -> None:
        """Keep what has arrived, unless another call has it by now."""
        if self._active.get(incoming.key) is not incoming:
            return
        del self._active[incoming.key]
        incoming.stopped = True
        now = asyncio.get_running_loop().time()
        self._forget(incoming.key)
        self._parts[incoming.key] = (now, incoming)
        in_all = sum(part.upload.size for _, part in self._parts.values())
        for key, (since, part) in list(self._parts.items()):
            if in_all <= self._max_idle_bytes and now - since <= FORGOTTEN_S:
                break
            in_all -= part.upload.size
            self._forget(key)

    def _forget(self, key: Key) -> None:
        if key in self._parts:
            self._parts.pop(key)[1].upload.close()

    def _drop(self, incoming: Incoming) -> None:
        if self._active.get(incoming.key) is incoming:
            del self._active[incoming.key]
        incoming.upload.close()
