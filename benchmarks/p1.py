"""P1: a step of example-level private training against a plain one, and against Opacus. P2: admission."""

from __future__ import annotations

from benchmarks.measure import FEDGE, FLOOR, Case, Goal, Options, Sample, Side, after_warm_up
from benchmarks.processes import module, run_json

_DEADLINE_S = 900
_WARM_UP = 20
"""Steps that are not counted: oneDNN compiles for every new size of a batch, of which Poisson samples have some 35."""


def cases(options: Options) -> list[Case]:
    steps = 10 if options.quick else 40
    return [*(_step(threads, steps, options) for threads in (1, 2)), _admission(options)]


def _step(threads: int, steps: int, options: Options) -> Case:
    def side(name: str, way: str) -> Side:
        return Side.of(name, lambda: _sample(way, threads, steps, options))

    return Case(
        f"P1-{threads}",
        f"a private step, CNN of 1.63M parameters, batch 64, {threads} thread{'s' * (threads > 1)}",
        (
            side(FLOOR, "plain"),
            side(FEDGE, "fedge"),
            side("Opacus, ghost clipping", "ghost"),
            side("Opacus, hooks", "hooks"),
        ),
        (
            Goal("a step, of a plain one", 1.5, lambda found: found.ratio(FLOOR)),
            Goal("memory for training, of plain", 1.3, lambda found: found.ratio(FLOOR, "growth_bytes")),
        ),
    )


def _sample(way: str, threads: int, steps: int, options: Options) -> Sample:
    arguments = module(
        "benchmarks.floors.private_step", way, "--threads", threads, "--steps", steps + _WARM_UP
    )
    log = options.scratch / f"{way}-{threads}.log"
    found, _ = run_json(arguments, log=log, deadline_s=_DEADLINE_S)
    return Sample(
        {
            "seconds": after_warm_up(found["seconds"], warm_up=_WARM_UP),
            "first_seconds": after_warm_up(found["seconds"][:_WARM_UP], warm_up=3),
            "growth_bytes": float(found["growth_bytes"]),
            "peak_rss_bytes": float(found["peak_bytes"]),
        },
        rounds=steps,
    )


def _admission(options: Options) -> Case:
    def take() -> Sample:
        arguments = module("benchmarks.admission", 10 if options.quick else 50)
        found, _ = run_json(arguments, log=options.scratch / "admission.log", deadline_s=_DEADLINE_S)
        return Sample({name: after_warm_up(values) for name, values in found.items()}, rounds=10)

    return Case(
        "P2",
        "a site admits a run that it has not seen, after 200 runs of 20 rounds",
        (Side.of(FEDGE, take),),
        (
            Goal("the whole of it", 0.03, lambda found: found.spread(FEDGE, "seconds"), "seconds"),
            Goal("each order's", 0.03, lambda found: found.spread(FEDGE, "reserve_seconds"), "seconds"),
        ),
    )
