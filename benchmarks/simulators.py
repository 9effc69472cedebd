"""Other simulators as sides of W1 and W2: those that the interpreter named by FEDGE_PEERS, or this one, has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache

from benchmarks.measure import Options, Sample, Side, after_warm_up
from benchmarks.processes import module, run_json

_NAMES = {"pfl": "pfl", "flower": "Flower (Ray)"}
_DEADLINE_S = 900


def sides(workload: str, *, rounds: int, options: Options) -> tuple[Side, ...]:
    """A side for each that is there; the others are left out."""
    return tuple(
        Side.of(shown, lambda name=name: _sample(name, workload, rounds=rounds, options=options))  # type: ignore[misc]  # it has a default
        for name, shown in _NAMES.items()
        if _is_installed(name)
    )


def without() -> str:
    """What a case's title says about those that are not there."""
    missing = [shown for name, shown in _NAMES.items() if not _is_installed(name)]
    return f" ({' and '.join(missing)} not installed)" if missing else ""


def _sample(name: str, workload: str, *, rounds: int, options: Options) -> Sample:
    began = time.monotonic()
    command = _command("run", name, workload, "--rounds", rounds)
    found, peak = run_json(command, log=options.scratch / f"{name}.log", deadline_s=_DEADLINE_S)
    values = {
        "seconds": after_warm_up(found["seconds"]),
        "process_seconds": time.monotonic() - began,
        "peak_rss_bytes": float(peak),
    }
    return Sample(values, rounds=rounds - 1)


def _command(*arguments: object) -> list[str]:
    peers = os.environ.get("FEDGE_PEERS") or sys.executable
    return [peers, *module("benchmarks.floors.simulators", *arguments)[1:]]


@cache
def _is_installed(name: str) -> bool:
    done = subprocess.run(  # an interpreter that the caller named
        _command("has", name, "w2"), capture_output=True, check=False, timeout=_DEADLINE_S
    )
    return done.returncode == 0
