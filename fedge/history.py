"""One committed round, as every shell records and shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """A committed round. `metrics` holds the clients' training metrics and, once there, the evaluation's.

    `seconds` is the time from the round's first order to its commit; `bytes_down` and `bytes_up` are the
    vectors that crossed the wire since the row before; `refused` counts orders and updates that failed.
    """

    round: int
    attempt: int
    clients: tuple[str, ...]
    num_examples: int
    seconds: float
    bytes_down: int
    bytes_up: int
    refused: int
    staleness: int = 0
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "round": self.round,
            "attempt": self.attempt,
            "clients": list(self.clients),
            "num_examples": self.num_examples,
            "seconds": self.seconds,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "refused": self.refused,
            "staleness": self.staleness,
            "metrics": plain_metrics(self.metrics),
        }


def plain_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics for JSON, which has no word for a mean that is NaN: it is null there."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
