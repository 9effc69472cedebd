"""What a simulation notes down of its rounds, and tells those who listen."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedge.events import OrderId
from fedge.history import Row, plain_metrics
from fedge.pipeline import Aggregate
from fedge_sim.privacy import Accounts
from fedge_sim.virtual.clock import Clock

Callback = Callable[[Row], None]
"""Called with each committed round; for an evaluated one a second time, with the evaluation's metrics."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When a round was committed in virtual time, `virtual_s` seconds from the run's beginning; what energy all devices
    had taken by then, how many orders had been called off or lost with their client, and how many clients were
    there."""

    virtual_s: float
    joules: float
    wasted: int
    present: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Seen:
    """What only a simulation sees of a round, beside its row: its moment, if there is virtual time; what the client
    with the least privacy left has spent by then (by RDP), if there is some; and of each metric of its evaluation the
    means over the tenth of clients with the lowest and the highest value."""

    moment: Moment | None = None
    epsilon: float | None = None
    tenths: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; only what there is."""
        found: dict[str, Any] = self.moment.as_dict() if self.moment is not None else {}
        if self.epsilon is not None:
            found["epsilon"] = self.epsilon
        if self.tenths:
            found["lowest_tenth"] = plain_metrics({name: low for name, (low, _) in self.tenths.items()})
            found["highest_tenth"] = plain_metrics({name: high for name, (_, high) in self.tenths.items()})
        return found


class Record:
    """Rows so far, and what is counted until the next; with a `clock` when each was over."""

    def __init__(self, callbacks: Sequence[Callback], clock: Clock | None, accounts: Accounts) -> None:
        self._callbacks, self._clock, self._accounts = callbacks, clock, accounts
        self._judged: tuple[OrderId | None, dict[str, Mapping[str, float]]] = (None, {})
        self.rows: list[Row] = []
        self.seen: list[Seen] = []
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
        clock = self._clock
        moment = (
            Moment(clock.now_s, clock.joules, clock.wasted, len(clock.present)) if clock is not None else None
        )
        self.seen.append(Seen(moment, self._accounts.worst()))
        self.rows.append(row)
        self.refused = self.up = self.down = 0
        self._began = now
        self._tell(row)

    def hear(self, order: OrderId, client: str, metrics: Mapping[str, float]) -> None:
        """What a client makes of the model that is evaluated; of an earlier evaluation nothing is kept."""
        if self._judged[0] != order:
            self._judged = order, {}
        self._judged[1][client] = metrics

    def judge(self, order: OrderId, metrics: Mapping[str, float]) -> None:
        """A round's model was evaluated."""
        at, (of, judged) = order.round - 1, self._judged
        self.seen[at] = replace(self.seen[at], tenths=tenths([*judged.values()]) if of == order else {})
        row = self.rows[at]
        row = replace(row, metrics={**row.metrics, **metrics})
        self.rows[at] = row
        self._tell(row)

    def _tell(self, row: Row) -> None:
        for callback in self._callbacks:
            callback(row)


def tenths(judged: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Of each metric the means over the tenth of clients, one at least, with the lowest and with the highest value."""
    found = {}
    for name in dict.fromkeys(name for each in judged for name in each):
        values = sorted(each[name] for each in judged if name in each)
        count = max(1, len(values) // 10)
        found[name] = statistics.fmean(values[:count]), statistics.fmean(values[-count:])
    return found
