"""W3: W2's model and data, with a hundred thousand clients: what a round costs, and what memory grows by. No floor.

Once by FedAvg, and once by SCAFFOLD, for which each client that has taken part keeps a vector as long as the model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.fedge_side import run_toml
from benchmarks.measure import FEDGE, Case, Goal, Options, Sample, Side
from benchmarks.simulation import simulate
from benchmarks.tasks.workload import W2

_CLIENTS = 100_000
_COHORT = 1000
_SETTLED = 20
"""Rounds until what is kept between them is there."""

_HISTORY_KB = 20.0
"""What a round may add: its row of the history names the thousand that took part."""


def cases(options: Options) -> list[Case]:
    rounds = 30 if options.quick else 40

    def simulated(**strategy: Any) -> Sample:
        work = {"steps": 2, "batch_size": W2.batch_size, "learning_rate": W2.learning_rate}  # an epoch
        run = run_toml("benchmarks.tasks.w2:task", rounds=rounds, cohort=_COHORT, work=work, **strategy)
        sample = simulate(run, name="w3", clients=_CLIENTS, options=options)
        return replace(sample, values=sample.values | _growth(sample.series["used_bytes"][_SETTLED:]))

    return [
        Case(
            name,
            f"simulate {_CLIENTS} clients, W2's MLP, {_COHORT} a round{more}",
            (Side.of(FEDGE, partial(simulated, **strategy)),),
            (
                Goal.of_fedge("peak memory", 2.0, "peak_rss_bytes", "GB", per=1e9),
                Goal.of_fedge("growth a round", _HISTORY_KB, "growth_a_round_bytes", "kB", per=1e3),
            ),
        )
        for name, more, strategy in (
            ("W3", "", {}),
            ("W3 SCAFFOLD", ", control variates", {"strategy": "scaffold", "clients": _CLIENTS}),
        )
    ]


def _growth(memory: list[float]) -> dict[str, float]:
    """What a round adds to what is allocated: the median slope between two rounds (Theil and Sen)."""
    pairs = [
        (later - earlier) / (second - first)
        for (first, earlier), (second, later) in combinations(enumerate(memory), 2)
    ]
    return {"growth_a_round_bytes": float(np.median(pairs))}
