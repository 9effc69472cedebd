"""S1: one mask on a vector of 1M elements. The floor is the same keystream and the same additions, by hand."""

from __future__ import annotations

from benchmarks.measure import FEDGE, Case, Goal, Options
from benchmarks.secure_side import fedge, floor, peers, without

_SIZE = 1_000_000
_GOAL_S = 0.002


def cases(options: Options) -> list[Case]:
    repeat = ("--size", _SIZE, "--repeat", 10 if options.quick else 51)
    return [
        Case(
            "S1",
            f"one mask drawn and added, 1M parameters{without('flower')}",
            (
                floor("mask", *repeat, "--piece", 4 * _SIZE, options=options),
                fedge("secure_parts", "mask", *repeat, options=options),
                *peers("mask", "flower", arguments=repeat, options=options),
            ),
            (Goal("of one mask", _GOAL_S, lambda found: found.spread(FEDGE, "seconds"), "seconds"),),
        )
    ]
