"""S4: a coordinator's work on 100 masked vectors of 1M elements, from the first that arrives to their mean."""

from __future__ import annotations

from benchmarks.measure import FEDGE, Case, Goal, Options
from benchmarks.secure_side import Cohort, on_cohort, peers, server_floor, without

_GOAL_S = 2.5


def cases(options: Options) -> list[Case]:
    return [_case(drop, options) for drop in (0, 10)]


def _case(drop: int, options: Options) -> Case:
    cohort = Cohort(100, 100_000 if options.quick else 1_000_000, drops=(0, 10))
    sizes = ("--size", cohort.size, "--sites", cohort.sites, "--drop", drop)
    return Case(
        f"S4-{drop}",
        f"the coordinator of 100, {cohort.size / 1e6:g}M parameters, {drop} % gone before they hand in"
        + without("flower"),
        (
            server_floor(cohort, drop, options=options),
            on_cohort("secure_server", cohort, "--drop", drop, options=options),
            *peers("server", "flower", arguments=sizes, how=" (one site, scaled)", options=options),
        ),
        (
            Goal(
                "from the first vector to the mean",
                _GOAL_S,
                lambda found: found.spread(FEDGE, "seconds"),
                "seconds",
            ),
        ),
    )
