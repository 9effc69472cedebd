"""What a simulation gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from fedge.history import Row, plain_metrics
from fedge.run import RunConfig
from fedge.run_state import Status
from fedge.vector import Model, bytes_of
from fedge_sim.faults import Injected
from fedge_sim.privacy import Spent
from fedge_sim.record import Moment, Seen

_TENTHS = ("lowest_tenth", "highest_tenth")


@dataclass(frozen=True, eq=False)
class Result:
    """A finished (or interrupted) simulation: a `Row` per committed round, and the model they made.

    `faults` is what was injected on the way, at the run's own request; `privacy` what the clients spent.
    """

    run: RunConfig
    clients: int
    history: tuple[Row, ...]
    model: Model
    status: Status
    reason: str = ""
    strategy: str = ""
    faults: Injected = field(default_factory=Injected)
    privacy: Spent = field(default_factory=Spent)
    seen: tuple[Seen, ...] = ()
    """What only a simulation sees of each round."""
    labels: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Of the first clients: how many training examples of each class they have, where there are classes."""
    engine: str = "loop"
    """What trained the clients, at the end."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the last round that has any."""
        return next((row.metrics for row in reversed(self.history) if row.metrics), {})

    def rows(self) -> list[dict[str, Any]]:
        """Plain values of each round, for JSON; with virtual time those of its moments among them."""
        beside = (seen.as_dict() for seen in self.seen) if self.seen else repeat({})
        return [row.as_dict() | more for row, more in zip(self.history, beside, strict=False)]

    @property
    def moments(self) -> tuple[Moment, ...]:
        """In virtual time: one for each row; none without."""
        return tuple(seen.moment for seen in self.seen if seen.moment is not None)

    def table(self) -> list[dict[str, Any]]:
        """Plain numbers of each round, as in history.csv: `clients` is how many, each metric a column where it has a
        value. `pandas.DataFrame(result.table())` takes it as it is.
        """
        rows = self.rows()
        return [
            {key: value for key, value in row.items() if not isinstance(value, dict)}
            | {"clients": len(row["clients"])}
            | row["metrics"]
            | {f"{name}_{each}": row[each][name] for each in _TENTHS for name in row.get(each, {})}
            for row in rows
        ]

    def summary(self) -> dict[str, Any]:
        """The result as one JSON object, without the history and the model themselves."""
        return {
            "name": self.run.name,
            "status": self.status,
            "reason": self.reason,
            "rounds": len(self.history),
            "clients": self.clients,
            "seed": self.run.seed,
            "strategy": self.strategy,
            "engine": self.engine,
            "privacy": self.privacy.as_dict(),
            "faults": self.faults.counts,
            "metrics": plain_metrics(self.metrics),
            "parameters": self.model.layout.size,
            "model_sha256": hashlib.sha256(bytes_of(self.model.vector)).hexdigest(),
            "seconds": sum(row.seconds for row in self.history),
            **({"clock": self.moments[-1].as_dict()} if self.moments else {}),
            "bytes_up": sum(row.bytes_up for row in self.history),
            "bytes_down": sum(row.bytes_down for row in self.history),
        }
