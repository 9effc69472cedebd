"""S5: all that a site sends for one secure sum. The floor is its update as plain float32 and nothing else."""

from __future__ import annotations

from benchmarks.measure import FLOOR, Case, Goal, Options, Sample, Side
from benchmarks.secure_side import Cohort, on_cohort, peers, without

_SIZE = 1_000_000
_LIMITS = {1: 1.01, 2: 1.05}


def cases(options: Options) -> list[Case]:
    """8 bits hold the sum of 21 sites at most, those of 100 need 11."""
    return [
        _case("S5-1", Cohort(100, 1000), ("flower", "ckks"), options),
        _case("S5-2", Cohort(100, 1000, suite=2), (), options),
        _case("S5-11bit", Cohort(100, 1000, bits=11), (), options),
        _case("S5-8bit", Cohort(20, 1000, bits=8), (), options),
    ]


def _case(name: str, cohort: Cohort, whose: tuple[str, ...], options: Options) -> Case:
    sizes = ("--size", _SIZE)
    keys = "" if cohort.suite == 1 else ", and ML-KEM-768"
    limit = _LIMITS[cohort.suite]
    return Case(
        name,
        f"what a site sends in a sum of {cohort.sites}, 1M parameters of {cohort.bits} bits{keys}{without(*whose)}",
        (
            Side.of(FLOOR, lambda: Sample({"upload_bytes": 4.0 * _SIZE, "most_upload_bytes": 4.0 * _SIZE})),
            on_cohort("secure_client", cohort, *sizes, options=options),
            *(side for one in whose for side in peers("upload", one, arguments=sizes, options=options)),
        ),
        (
            Goal("a site in the middle, of plain", limit, lambda found: found.ratio(FLOOR, "upload_bytes")),
            Goal(
                "the site that sends most, of plain",
                limit,
                lambda found: found.ratio(FLOOR, "most_upload_bytes"),
            ),
        ),
        compares="upload_bytes",
    )
