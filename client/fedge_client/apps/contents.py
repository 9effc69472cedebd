"""What an app's messages carry, on its way to this site: once for all messages that carry the same.

What has arrived when a link breaks stays; the next link goes on behind it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np

from fedge.vector import bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge_client.download import Download
from fedge_client.link import Link
from fedge_client.transfer import Transfers


@dataclass(eq=False, slots=True)
class _Content:
    download: Download
    users: set[str] = field(default_factory=set)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Contents:
    """Of one app's run; at most `most` different ones are here at once, of messages that are not done yet."""

    def __init__(self, run_id: str, *, most: int) -> None:
        self._run_id = run_id
        self._most = most
        self._held: dict[bytes, _Content] = {}
        self._changed = asyncio.Event()

    async def fetch(self, id: str, blob: pb.Blob, link: Link) -> memoryview:
        """The content of a message, which is here until `release`.

        Raises:
            LinkError: the link is closed before all is here.
            RemoteProtocolError: it is not what was announced.
            MemoryError: there is no room for it.
        """
        if blob.HasField("inline"):
            Download(blob, np.empty(blob.size, np.uint8))  # checked
            return memoryview(blob.inline)
        content = await self._of(blob)
        content.users.add(id)
        async with content.turn:
            await Transfers().insist(link, lambda: link.fetch(self._run_id, content.download))
        return bytes_of(content.download.out)

    def release(self, id: str) -> None:
        """A message is done, or is not wanted, or comes again over another link."""
        for digest, content in list(self._held.items()):
            content.users.discard(id)
            if not content.users and content.download.complete:
                del self._held[digest]
        self._changed.set()

    async def _of(self, blob: pb.Blob) -> _Content:
        """What is here of it, once there is room for another."""
        while blob.digest not in self._held:
            if len(self._held) >= self._most:  # parts that nobody came back for
                for digest in [digest for digest, content in self._held.items() if not content.users][:1]:
                    del self._held[digest]
            if len(self._held) < self._most:
                self._held[blob.digest] = _Content(Download(blob, np.empty(blob.size, np.uint8)))
                break
            self._changed.clear()
            await self._changed.wait()
        return self._held[blob.digest]
