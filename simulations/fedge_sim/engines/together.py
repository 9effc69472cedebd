"""The gate for many updates at once. What it does not pass is for the gate itself to refuse, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedge.exact import MAX_WEIGHT
from fedge.vector import Array
from fedge.wire.limits import MAX_METRICS, MAX_NAME_BYTES
from fedge_client.gate import Released
from fedge_client.torch.trainer import Outcome


def pass_together(outcomes: Sequence[Outcome], vectors: Array) -> list[Released] | None:
    """What `fedge_client.gate.release` makes of these updates (finite ones, float32[clients, size]) without layers or
    terms of privacy, if it lets all of them pass; else None."""
    if not all(map(_passes, outcomes)):
        return None
    return [
        Released(vector, each.num_examples, each.metrics)
        for each, vector in zip(outcomes, vectors, strict=True)
    ]


def _passes(outcome: Outcome) -> bool:
    metrics = outcome.metrics
    return (
        1 <= outcome.num_examples < MAX_WEIGHT
        and len(metrics) <= MAX_METRICS
        and all(
            0 < len(name.encode()) <= MAX_NAME_BYTES and name.isprintable() and math.isfinite(value)
            for name, value in metrics.items()
        )
    )
