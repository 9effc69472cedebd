"""The gate for many updates at once. What it does not pass is for the gate itself to refuse, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedge.exact import MAX_WEIGHT
from fedge.wire.limits import MAX_METRICS, MAX_NAME_BYTES
from fedge_client.local import Outcome


def all_pass(outcomes: Iterable[Outcome]) -> bool:
    """Whether `fedge_client.gate.release` lets all of these pass, as they are, whose vectors are finite: without layers
    or terms of privacy."""
    return all(map(_passes, outcomes))


def _passes(outcome: Outcome) -> bool:
    metrics = outcome.metrics
    return (
        isinstance(outcome.num_examples, int)
        and 1 <= outcome.num_examples < MAX_WEIGHT
        and len(metrics) <= MAX_METRICS
        and all(
            0 < len(name.encode()) <= MAX_NAME_BYTES and name.isprintable() and math.isfinite(value)
            for name, value in metrics.items()
        )
    )
