"""Other simulators as sides of W1 and W2: those that the interpreter named by FEDGE_PEERS, or this one, has."""

from __future__ import annotations

import time
from functools import partial

from benchmarks.measure import Options, Sample, Side, after_warm_up
from benchmarks.peers import by_peers, is_installed, missing
from benchmarks.processes import run_json

_SIMULATORS = "benchmarks.floors.simulators"
_NAMES = {"pfl": "pfl", "flower": "Flower (Ray)"}
_DEADLINE_S = 900


def sides(workload: str, *, rounds: int, options: Options) -> tuple[Side, ...]:
    """A side for each that is there; the others are left out."""
    return tuple(
        Side.of(shown, partial(_sample, name, workload, rounds=rounds, options=options))
        for name, shown in _NAMES.items()
        if _has(name)
    )


def without() -> str:
    """What a case's title says about those that are not there."""
    return missing({shown: _has(name) for name, shown in _NAMES.items()})


def _sample(name: str, workload: str, *, rounds: int, options: Options) -> Sample:
    began = time.monotonic()
    command = by_peers(_SIMULATORS, "run", name, workload, "--rounds", rounds)
    found, peak = run_json(command, log=options.scratch / f"{name}.log", deadline_s=_DEADLINE_S)
    values = {
        "seconds": after_warm_up(found["seconds"]),
        "process_seconds": time.monotonic() - began,
        "peak_rss_bytes": float(peak),
    }
    return Sample(values, rounds=rounds - 1)


def _has(name: str) -> bool:
    return is_installed(_SIMULATORS, name, "w2")
