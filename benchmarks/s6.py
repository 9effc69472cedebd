"""S6: a coordinator's work on 1000 masked vectors of 100,000 elements, in sums of some 170 each."""

from __future__ import annotations

from benchmarks.measure import FEDGE, Case, Goal, Options
from benchmarks.secure_side import Cohort, on_cohort, server_floor

_GOALS_S = {0: 0.5, 10: 20.0, 30: 45.0}


def cases(options: Options) -> list[Case]:
    return [_case(drop, options) for drop in _GOALS_S]


def _case(drop: int, options: Options) -> Case:
    cohort = Cohort(300 if options.quick else 1000, 100_000, drops=tuple(_GOALS_S))
    return Case(
        f"S6-{drop}",
        f"the coordinator of {cohort.sites} in shards, 100K parameters, {drop} % gone before they hand in",
        (
            server_floor(cohort, drop, options=options),
            on_cohort("secure_server", cohort, "--drop", drop, options=options),
        ),
        (
            Goal(
                "from the first vector to the mean",
                _GOALS_S[drop],
                lambda found: found.spread(FEDGE, "seconds"),
                "seconds",
            ),
        ),
    )
