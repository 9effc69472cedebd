"""What a federation's runs may have spent of each site, from their statements: the coordinator's own record.

Sites count more closely, each in its own ledger; this is what can be said without them. Epsilons and deltas of
several runs add up (basic composition: Dwork and Roth 2014, theorem 3.16), which is valid whatever the mechanisms are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedge.privacy.config import Unit


@dataclass(frozen=True, slots=True)
class Spend:
    """One site under one unit of privacy. `epsilon` at `delta` bounds the runs that promise one; `unbounded` are runs
    of which nothing can be said: those without privacy, and those whose noise alone is fixed."""

    site: str
    unit: Unit
    runs: int = 0
    epsilon: float = 0.0
    delta: float = 0.0
    unbounded: int = 0


def population(statements: Iterable[Mapping[str, Any]]) -> list[Spend]:
    """By site and unit, from statements as `fedge.privacy.statement.Statement` encodes them."""
    found: dict[tuple[str, Unit], Spend] = {}
    for statement in statements:
        unit, epsilon, delta = statement["unit"], statement["epsilon"], statement["delta"]
        for site, rounds in statement["sites"].items():
            if not rounds:
                continue
            before = found.get((site, unit), Spend(site, unit))
            after = replace(before, runs=before.runs + 1)
            if epsilon is None or delta is None:
                after = replace(after, unbounded=before.unbounded + 1)
            else:
                after = replace(after, epsilon=before.epsilon + epsilon, delta=before.delta + delta)
            found[site, unit] = after
    return [found[key] for key in sorted(found)]
