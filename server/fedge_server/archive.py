"""The store as runs see it: moments that are kept whole, by the one thread that writes.

A moment of a run is its state machine, its rows, its accepted updates and, if rounds were committed since
the one before, the strategy's state.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from fedge.errors import StorageError
from fedge.faults import Faults
from fedge.files import private_folder
from fedge.snapshot import Snapshot, take
from fedge.vector import Array
from fedge_server.spool import Held
from fedge_server.store.checkpoints import Checkpoints
from fedge_server.store.records import Event, KeptRun, Progress, RunRecord
from fedge_server.store.store import Store

log = logging.getLogger(__name__)

R = TypeVar("R")

KEPT_CHECKPOINTS: Final = 2


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds. The model is the state's own, under a name that every strategy's has."""

    model: Array
    state: Any


@dataclass(frozen=True, eq=False)
class Moment:
    """A run between two events. `saved` is set if rounds were committed since the last one."""

    progress: Progress
    saved: Saved | None = None
    uploads: Sequence[Held] = ()


class Archive:
    """The store, the checkpoints' folders and the thread that writes to them."""

    def __init__(self, store: Store, folder: Path, faults: Faults | None = None) -> None:
        self.store = store
        self.faults = faults or Faults()
        self._folder = private_folder(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def call(self, function: Callable[..., R], *arguments: Any) -> R:
        """Do something with the store where it may block."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def checkpoints(self, run_id: str) -> Checkpoints:
        return Checkpoints(self._folder / run_id, self.faults)

    def add_run(self, record: RunRecord, moment: Moment) -> None:
        """Keep a new run.

        Raises:
            StorageError: it was not kept.
        """
        self.store.add_run(record, self._with_checkpoint(moment))

    def keep(self, moment: Moment) -> None:
        """Keep a moment of a run: files first, then, in one transaction, what names them.

        Raises:
            StorageError: the moment that was kept before stands.
        """
        self.faults.reach("updates.before")
        for held in moment.uploads:
            held.sync()
        self.faults.reach("updates.after")
        progress = self._with_checkpoint(moment)
        self.store.save(progress, now=time.time(), keep=KEPT_CHECKPOINTS)
        if moment.saved is not None:
            self.checkpoints(progress.run_id).sweep(self.store.digests(progress.run_id))

    def read(self, kept: KeptRun) -> Snapshot:
        """The strategy's state at the last moment that was kept.

        Raises:
            StorageError: it cannot be read.
        """
        checkpoint = kept.progress.checkpoint
        if checkpoint is None:
            raise StorageError(f"store: expected a checkpoint of run {kept.record.run_id}, found none")
        return self.checkpoints(kept.record.run_id).read(checkpoint)

    def forget(self, run_id: str) -> None:
        """Drop all that is known of a run.

        Raises:
            StorageError: it is still known.
        """
        self.store.forget_run(run_id)
        shutil.rmtree(self._folder / run_id, ignore_errors=True)

    def note(self, kind: str, subject: str, *, actor: str = "", detail: str = "") -> None:
        """Keep an event for auditors, behind the caller's back; it is in the log in any case."""
        event = Event(time.time(), kind, subject, actor, detail)
        with suppress(RuntimeError):  # the thread has ended: the process is about to
            self._thread.submit(self._record, event)

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown()

    def _record(self, event: Event) -> None:
        try:
            self.store.record(event)
        except StorageError as error:
            log.error("event_not_kept kind=%s subject=%s reason=%s", event.kind, event.subject, error)

    def _with_checkpoint(self, moment: Moment) -> Progress:
        if moment.saved is None:
            return moment.progress
        progress = moment.progress
        written = self.checkpoints(progress.run_id).write(take(moment.saved), round=progress.committed)
        return replace(progress, checkpoint=written)
