"""What a simulation notes down of its rounds, and tells those who listen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedge.events import OrderId
from fedge.history import Row
from fedge.pipeline import Aggregate
from fedge_sim.virtual.clock import Clock

Callback = Callable[[Row], None]
"""Called with each committed round; for an evaluated one a second time, with the evaluation's metrics."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When a round was committed in virtual time, `virtual_s` seconds from the run's beginning; what energy all devices
    had taken by then, how many of their orders had come to nothing, and how many clients were there."""

    virtual_s: float
    joules: float
    wasted: int
    present: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


class Record:
    """Rounds so far, and what is counted until the next; with a `clock` when each was over."""

    def __init__(self, callbacks: Sequence[Callback], clock: Clock | None) -> None:
        self._callbacks, self._clock = callbacks, clock
        self.rows: list[Row] = []
        self.moments: list[Moment] = []
        self.refused = self.up = self.down = 0
        self._began = time.perf_counter()

    def begin(self) -> None:
        """The next round's time begins now."""
        self._began = time.perf_counter()

    def put(self, order: OrderId, aggregate: Aggregate) -> None:
        """A round is committed."""
        now = time.perf_counter()
        row = Row(
            round=order.round,
            attempt=order.attempt,
            clients=aggregate.clients,
            num_examples=aggregate.num_examples,
            seconds=now - self._began,
            bytes_down=self.down,
            bytes_up=self.up,
            refused=self.refused,
            staleness=aggregate.staleness,
            metrics=aggregate.metrics,
        )
        if (clock := self._clock) is not None:
            self.moments.append(Moment(clock.now_s, clock.joules, clock.wasted, len(clock.present)))
        self.rows.append(row)
        self.refused = self.up = self.down = 0
        self._began = now
        self._tell(row)

    def judge(self, round: int, metrics: Mapping[str, float]) -> None:
        """A round's model was evaluated."""
        row = self.rows[round - 1]
        row = replace(row, metrics={**row.metrics, **metrics})
        self.rows[round - 1] = row
        self._tell(row)

    def _tell(self, row: Row) -> None:
        for callback in self._callbacks:
            callback(row)
