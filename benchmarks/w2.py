"""W2: simulating a small MLP. The floor is the bare loop in one process with one thread."""

from __future__ import annotations

from benchmarks import simulators
from benchmarks.fedge_side import run_toml
from benchmarks.loops import loop, stacked
from benchmarks.measure import FEDGE, FLOOR, Case, Goal, Options, Sample, Side
from benchmarks.simulation import simulate
from benchmarks.tasks.workload import W2


def cases(options: Options) -> list[Case]:
    rounds = 20 if options.quick else 100

    def fedge() -> Sample:
        work = {"epochs": 1, "batch_size": W2.batch_size, "learning_rate": W2.learning_rate}
        run = run_toml("benchmarks.tasks.w2:task", rounds=rounds, cohort=W2.cohort, work=work)
        return simulate(run, name="w2", clients=W2.clients, options=options)

    return [
        Case(
            "W2",
            "simulate 1000 clients, MLP 60-64-10, 100 a round" + simulators.without(),
            (
                Side.of(FLOOR, lambda: loop("w2", rounds=rounds, options=options)),
                Side.of(FEDGE, fedge),
                Side.of("stacked by hand", lambda: stacked(rounds=rounds, options=options)),
                *simulators.sides("w2", rounds=6, options=options),
            ),
            (
                Goal("a round, of the bare loop's", 0.15, lambda found: found.ratio(FLOOR)),
                Goal.of_fedge(
                    "from the start to the end of round 1, beyond importing torch",
                    4.0,
                    "first_round_seconds",
                    "s",
                ),
            ),
        )
    ]
