"""S3: all that a site computes for one secure sum among 100, without training and without encoding its update."""

from __future__ import annotations

from benchmarks.measure import FEDGE, Case, Goal, Options, Side
from benchmarks.secure_side import Cohort, floor, on_cohort, peers, without

_SITES, _SIZE = 100, 1_000_000
_GOAL_S = 0.35


def cases(options: Options) -> list[Case]:
    return [_case(suite, options) for suite in (1, 2)]


def _case(suite: int, options: Options) -> Case:
    cohort, sizes = Cohort(_SITES, 1000, suite), ("--size", _SIZE)
    repeat = 2 if options.quick else 6
    whose = ("flower", "ckks") if suite == 1 else ()
    return Case(
        f"S3-{suite}",
        f"a site's part of a sum of 100, 1M parameters, {'X25519' if suite == 1 else 'and ML-KEM-768'}"
        + without(*whose),
        (
            _floor(suite, options),
            on_cohort("secure_client", cohort, *sizes, "--repeat", repeat, options=options),
            *(side for one in whose for side in peers("client", one, arguments=sizes, options=options)),
        ),
        (Goal("P0 to P4", _GOAL_S, lambda found: found.spread(FEDGE, "seconds"), "seconds"),),
    )


def _floor(suite: int, options: Options) -> Side:
    """With each other site: a mask, two agreements (for the channel and for the mask), its keys' signature and its
    consent's. In suite 2 both encapsulate for the channel, and one of them for the mask."""
    others = _SITES - 1
    counts = ("--size", _SIZE, "--masks", _SITES, "--agreements", 2 * others, "--signatures", 2 * others)
    kem = others + others // 2 if suite == 2 else 0
    return floor("work", *counts, "--encapsulations", kem, "--decapsulations", kem, options=options)
