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
from fedge_sim.record import Moment


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
    moments: tuple[Moment, ...] = ()
    """In virtual time, where there is any: one for each row."""
    engine: str = "loop"
    """What trained the clients, at the end."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the last round that has any."""
        return next((row.metrics for row in reversed(self.history) if row.metrics), {})

    def rows(self) -> list[dict[str, Any]]:
        """Plain values of each round, for JSON; with virtual time those of its moments among them."""
        moments = (moment.as_dict() for moment in self.moments) if self.moments else repeat({})
        return [row.as_dict() | moment for row, moment in zip(self.history, moments, strict=False)]

    def table(self) -> list[dict[str, Any]]:
        """Plain numbers of each round, as in history.csv: `clients` is how many, each metric a column where it has a
        value. `pandas.DataFrame(result.table())` takes it as it is.
        """
        rows = self.rows()
        return [
            {key: value for key, value in row.items() if key != "metrics"}
            | {"clients": len(row["clients"])}
            | row["metrics"]
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
