"""S2: two secrets of 32 bytes shared among 100, and rebuilt from 67 shares. No floor: big integers by hand instead."""

from __future__ import annotations

from benchmarks.measure import FEDGE, Case, Goal, Options
from benchmarks.secure_side import fedge, floor, peers, without

_GOAL_S = 0.005


def cases(options: Options) -> list[Case]:
    repeat = ("--repeat", 5 if options.quick else 21)
    return [
        Case(
            "S2",
            f"two secrets shared among 100 and rebuilt from 67 shares{without('flower')}",
            (
                floor("shamir", *repeat, options=options, name="Python's integers"),
                fedge("secure_parts", "shamir", *repeat, options=options),
                *peers("shamir", "flower", options=options),
            ),
            (Goal("both of it", _GOAL_S, lambda found: found.spread(FEDGE, "seconds"), "seconds"),),
        )
    ]
