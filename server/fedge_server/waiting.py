"""Accepted updates that are not summed yet: they wait in their spools, so that a few are summed in one pass.

A round of at most `TOGETHER` updates is summed as it closes, and then needs no memory for sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedge.pipeline import Update
from fedge.strategy import WorkKind
from fedge_server.spool import Upload

TOGETHER = 8
"""Updates of a round that wait at most: each is a file of the model's size."""


class Waiting:
    """Owns the uploads of the updates in it."""

    def __init__(self) -> None:
        self._kinds: dict[WorkKind, list[tuple[Update, Upload | None]]] = {}

    def add(self, kind: WorkKind, update: Update, upload: Upload | None) -> bool:
        """Keep an update; returns whether there are so many by now that they should be summed."""
        waiting = self._kinds.setdefault(kind, [])
        waiting.append((update, upload))
        return len(waiting) >= TOGETHER

    @contextmanager
    def taken(self, kind: WorkKind) -> Iterator[list[Update]]:
        """The updates for the open order of that kind, which are gone afterwards."""
        waiting = self._kinds.pop(kind, [])
        try:
            yield [update for update, _ in waiting]
        finally:
            for _, upload in waiting:
                if upload is not None:
                    upload.close()

    def drop(self, kind: WorkKind) -> None:
        """Forget the updates of an order that is given up."""
        with self.taken(kind):
            pass

    def clear(self) -> None:
        """Forget all updates."""
        for kind in list(self._kinds):
            self.drop(kind)
