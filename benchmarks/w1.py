"""W1: simulating a small CNN. The floor is the bare loop as two processes with one thread each."""

from __future__ import annotations

from benchmarks import simulators
from benchmarks.fedge_side import run_toml
from benchmarks.loops import loop
from benchmarks.measure import FEDGE, FLOOR, Case, Goal, Options, Sample, Side
from benchmarks.simulation import simulate
from benchmarks.tasks.workload import W1


def cases(options: Options) -> list[Case]:
    rounds = 4 if options.quick else 6

    def fedge() -> Sample:
        work = {"epochs": 1, "batch_size": W1.batch_size, "learning_rate": W1.learning_rate}
        run = run_toml("benchmarks.tasks.w1:task", rounds=rounds, cohort=W1.cohort, work=work)
        return simulate(run, name="w1", clients=W1.clients, options=options, engine="processes")

    return [
        Case(
            "W1",
            "simulate 100 clients, CNN of 1.63M parameters, 20 a round" + simulators.without(),
            (
                Side.of(FLOOR, lambda: loop("w1", rounds=rounds, processes=2, options=options)),
                Side.of(FEDGE, fedge),
                Side.of("loop, 1 thread", lambda: loop("w1", rounds=rounds, options=options)),
                Side.of("loop, 2 threads", lambda: loop("w1", rounds=rounds, threads=2, options=options)),
                *simulators.sides("w1", rounds=3, options=options),
            ),
            (Goal("a round, of the two-process loop's", 1.05, lambda found: found.ratio(FLOOR)),),
        )
    ]
