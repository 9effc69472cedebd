"""What a run has to tell: a row per committed round, who is here, and a revision that watchers follow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedge.history import Row
from fedge.refusal import Refusal


@dataclass(slots=True)
class History:
    """Rows by round, and for each the revision at which it last changed."""

    rows: list[Row] = field(default_factory=list)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    revision: int = 0
    _changed_at: list[int] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._changed_at = [0] * len(self.rows)  # rows of an earlier process

    def evaluated(self, round: int, metrics: Mapping[str, float]) -> Row:
        """The row of `round` with an evaluation of the model that it made; it is not in the history yet."""
        row = self.rows[round - 1]
        return replace(row, metrics={**row.metrics, **metrics})

    def put(self, row: Row) -> None:
        """The next round's row, or an earlier one's in its new form."""
        index = row.round - 1
        self.rows[index : index + 1] = [row]
        self._changed_at[index : index + 1] = [self.revision + 1]
        self.touch()

    def touch(self) -> None:
        """Something changed: wake whoever waits."""
        self.revision += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def since(self, revision: int) -> list[Row]:
        """Rows that changed after `revision`."""
        pairs = zip(self.rows, self._changed_at, strict=True)
        return [row for row, changed_at in pairs if changed_at > revision]

    async def changed_after(self, revision: int) -> int:
        """Wait until there is something newer than `revision`; returns the newest revision."""
        while self.revision <= revision:
            await self._changed.wait()
        return self.revision
