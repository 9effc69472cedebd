"""What each site has this coordinator keep of its ledger: sealed, so that only the site can read it.

A site whose whole disk is put back to an earlier day has forgotten what it spent since; this was elsewhere.
Kept behind the messages that bring it: a crash may lose the last moment's, and an older one is still true.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from fedge.errors import RemoteProtocolError, StorageError
from fedge_server.store.registry import Registry

log = logging.getLogger(__name__)

MAX_BYTES: Final = 256


class Witnesses:
    """All methods but `close` belong to the event loop's thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._newest: dict[str, bytes] = {}
        self._pending: dict[str, bytes] = {}
        self._writing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="witnesses")

    async def of(self, site: str) -> bytes:
        """What a site had kept last; empty if nothing.

        Raises:
            StorageError: the records cannot be read.
        """
        if site not in self._newest:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._registry.witness, site)
            self._newest.setdefault(site, found)
        return self._newest[site]

    def remember(self, site: str, sealed: bytes) -> None:
        """Keep this instead.

        Raises:
            RemoteProtocolError: it is too large to be what it should be.
        """
        if not 0 < len(sealed) <= MAX_BYTES:
            raise RemoteProtocolError(f"expected a witness of 1 to {MAX_BYTES} bytes, found {len(sealed)}")
        self._newest[site] = self._pending[site] = sealed
        if not self._writing:
            self._write()

    def close(self) -> None:
        """Write what is left, and wait for it. Nothing may be remembered any more."""
        self._thread.shutdown()
        if self._pending:
            self._keep(self._pending)

    def _write(self) -> None:
        """Everything that came while the last ones were written, together."""
        self._writing, taken, self._pending = True, self._pending, {}
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._keep, taken)
        done.add_done_callback(self._written)

    def _written(self, _: asyncio.Future[None]) -> None:
        self._writing = False
        if self._pending:
            self._write()

    def _keep(self, taken: dict[str, bytes]) -> None:
        try:
            self._registry.keep_witnesses(taken)
        except StorageError as error:  # each site sends a newer one with its next work
            log.warning("witnesses_not_kept sites=%d reason=%s", len(taken), error)
