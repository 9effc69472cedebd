"""Accepted updates of open orders: those that are not summed yet, and those that are but stay until the end.

A few are summed in one pass; a round of at most `TOGETHER` updates is summed as it closes, and then needs
no memory for sums. A summed update stays in its file until its order is over, so that a coordinator that
starts again can sum it again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedge.events import OrderId
from fedge.pipeline import Update
from fedge.strategy import WorkKind
from fedge_server.spool import Upload

TOGETHER = 8
"""Updates of an order that wait to be summed, at most."""

SMALL_ONES = 1024
"""Summed updates in memory that wait to be kept, at most: further ones are dropped."""


@dataclass(slots=True, eq=False)
class Accepted:
    """An accepted update. `summed`: it is in the sum. `kept`: the store has it."""

    order: OrderId
    update: Update
    upload: Upload | None
    summed: bool = False
    kept: bool = False

    def close(self) -> None:
        if self.upload is not None:
            self.upload.close()

    @property
    def gone(self) -> bool:
        return self.upload is not None and self.upload.closed


class Waiting:
    """Owns the uploads of the updates in it; files of summed ones take at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kinds: dict[WorkKind, list[Accepted]] = {}

    def add(self, accepted: Accepted) -> bool:
        """Keep an update; returns whether so many wait by now that they should be summed."""
        of_kind = self._kinds.setdefault(accepted.order.kind, [])
        of_kind.append(accepted)
        return sum(not each.summed for each in of_kind) >= TOGETHER

    @contextmanager
    def taken(self, kind: WorkKind) -> Iterator[list[Update]]:
        """The updates for the open order of that kind that are to be summed; afterwards they are."""
        waiting = [each for each in self._kinds.get(kind, []) if not each.summed]
        try:
            yield [each.update for each in waiting]
        finally:
            for each in waiting:
                each.summed = True
            self._make_room()

    def unkept(self) -> list[Accepted]:
        """What the store does not have yet and could have."""
        return [each for each in self._all() if not each.kept and not each.gone]

    def were_kept(self, accepted: Collection[Accepted]) -> None:
        """The store has these now: what is in memory of them and summed is not needed any more."""
        for each in accepted:
            each.kept = True
        self._make_room()

    def drop(self, kind: WorkKind) -> None:
        """Forget the updates of an order that is over."""
        for each in self._kinds.pop(kind, []):
            each.close()

    def clear(self) -> None:
        """Forget all updates."""
        for kind in list(self._kinds):
            self.drop(kind)

    def _all(self) -> list[Accepted]:
        return [each for of_kind in self._kinds.values() for each in of_kind]

    def _make_room(self) -> None:
        on_disk, in_memory = 0, 0
        for each in self._all():
            if not each.summed or each.upload is None or each.upload.closed:
                continue
            if each.upload.in_file:
                on_disk += each.upload.size
                if on_disk > self._max_bytes:
                    each.close()
            else:
                in_memory += not each.kept
                if each.kept or in_memory > SMALL_ONES:
                    each.close()
