"""Keeps one run, behind its rounds: they do not wait for the disk, unless it fails.

What happened after the last moment that was kept is done again after a crash, by the same orders; how
much that may be is the run's own setting.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from fedge.errors import StorageError
from fedge.run import CheckpointConfig
from fedge_server.archive import Archive, Moment

log = logging.getLogger(__name__)

_RETRY_S: Final = 0.5
_MAX_RETRY_S: Final = 10.0
_MOST_OF_THE_TIME: Final = 9
"""Between two moments at least so many times what keeping the first has taken: a tenth of the time at most."""


class Keeper:
    """Keeps one run's moments: one at a time, the newest, and not more often than its run wants."""

    def __init__(self, archive: Archive, terms: CheckpointConfig, *, committed: int) -> None:
        self.committed = committed
        """Rounds that are safe."""
        self.trouble = ""
        """Why the last attempt failed; empty if it did not."""
        self._archive = archive
        self._terms = terms
        self._kept_at = time.monotonic()
        self._took_s = 0.0
        self._writing: asyncio.Task[None] | None = None

    def due_in_s(self, committed: int) -> float | None:
        """When a moment with so many rounds should be kept; None while another is being kept."""
        if self._writing is not None:
            return None
        since = time.monotonic() - self._kept_at
        wanted = 0.0 if committed - self.committed >= self._terms.rounds else self._terms.seconds
        return max(0.0, max(wanted, _MOST_OF_THE_TIME * self._took_s) - since)

    def keep(self, moment: Moment, kept: Callable[[], None]) -> None:
        """Begin to keep a moment, trying until it is; `kept` is called when it is."""
        assert self._writing is None  # asked before
        self._writing = asyncio.create_task(self._keep(moment, kept), name=f"keeper {moment.progress.run_id}")

    async def settled(self) -> None:
        """Wait until nothing is being kept."""
        if self._writing is not None:
            await asyncio.wait([self._writing])

    def stop(self) -> None:
        """Give up what is being kept."""
        if self._writing is not None:
            self._writing.cancel()

    async def _keep(self, moment: Moment, kept: Callable[[], None]) -> None:
        run_id, wait = moment.progress.run_id, _RETRY_S
        while True:
            began = time.monotonic()
            try:
                await self._archive.call(self._archive.keep, moment)
                break
            except StorageError as error:
                if not self.trouble:
                    log.error("run_not_kept run=%s reason=%s", run_id, error)
                self.trouble = str(error)
            except Exception as error:  # a defect: what could not be kept must not be taken for kept
                if not self.trouble:
                    log.exception("run_not_kept run=%s", run_id)
                self.trouble = f"internal error: {type(error).__name__}: {error}"
            await asyncio.sleep(wait)
            wait = min(2 * wait, _MAX_RETRY_S)
        if self.trouble:
            log.warning("run_kept_again run=%s", run_id)
            self.trouble = ""
        self.committed = moment.progress.committed
        self._kept_at = time.monotonic()
        self._took_s = self._kept_at - began
        self._writing = None
        kept()
