"""W3: W2's model and data, with a hundred thousand clients: what a round costs, and what memory grows by. No floor."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from benchmarks.fedge_side import run_toml
from benchmarks.measure import FEDGE, Case, Goal, Options, Sample, Side
from benchmarks.simulation import simulate
from benchmarks.tasks.workload import W2

_CLIENTS = 100_000
_COHORT = 1000
_SETTLED = 5
"""Rounds until what is kept between them is there."""


def cases(options: Options) -> list[Case]:
    rounds = 12 if options.quick else 20

    def fedge() -> Sample:
        work = {"epochs": 1, "batch_size": W2.batch_size, "learning_rate": W2.learning_rate}
        run = run_toml("benchmarks.tasks.w2:task", rounds=rounds, cohort=_COHORT, work=work)
        sample = simulate(run, name="w3", clients=_CLIENTS, options=options)
        return replace(sample, values=sample.values | _growth(sample.series["rss_bytes"][_SETTLED:]))

    return [
        Case(
            "W3",
            f"simulate {_CLIENTS} clients, W2's MLP, {_COHORT} a round",
            (Side.of(FEDGE, fedge),),
            (
                Goal.of_fedge("peak memory", 2.0, "peak_rss_bytes", "GB", per=1e9),
                Goal.of_fedge(
                    "growth a round, in standard errors of it", 2.0, "growth_standard_errors", "SE"
                ),
            ),
        )
    ]


def _growth(memory: list[float]) -> dict[str, float]:
    """The slope of a line through the memory after each round, and that by its standard error."""
    rounds = np.arange(len(memory))
    slope, start = np.polyfit(rounds, memory, 1)
    residuals = np.asarray(memory) - (slope * rounds + start)
    spread = math.sqrt(
        float(residuals @ residuals) / (len(memory) - 2) / float(((rounds - rounds.mean()) ** 2).sum())
    )
    return {
        "growth_a_round_bytes": float(slope),
        "growth_standard_errors": float(slope) / spread if spread else 0.0,
    }
