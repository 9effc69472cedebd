"""fedge's side of a simulation: `fedge_sim.simulate` in a process of its own.

    python -m benchmarks.simulation RUN.toml --clients N

Prints an object: "history_seconds", what the history says of each round; "period_seconds", the times from one committed
round to the next, which miss nothing between rounds; "used_bytes", what is allocated of the process's memory after
each; "import_seconds", how long importing torch takes, and "first_round_seconds", everything up to the end of round 1
beyond it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil

from benchmarks.measure import Options, Sample, round_seconds
from benchmarks.processes import module, run_json


def simulate(run: str, *, name: str, clients: int, options: Options, engine: str = "auto") -> Sample:
    """One simulation in a fresh process: seconds a round without the first, and the peak of its memory."""
    path = options.scratch / f"{name}.toml"
    path.write_text(run)
    began = time.monotonic()
    found, peak = run_json(
        module("benchmarks.simulation", path, "--clients", clients, "--engine", engine),
        log=options.scratch / f"{name}.log",
        deadline_s=900,
    )
    values = round_seconds(found["history_seconds"], found["period_seconds"])
    values |= {"process_seconds": time.monotonic() - began, "peak_rss_bytes": float(peak)}
    values |= {"first_round_seconds": found["first_round_seconds"], "import_seconds": found["import_seconds"]}
    return Sample(
        values, rounds=len(found["history_seconds"]) - 1, series={"used_bytes": found["used_bytes"]}
    )


_MALLINFO = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _Mallinfo(ctypes.Structure):
    """mallinfo2(3), as glibc has it from 2.33 on."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def _used_bytes() -> Callable[[], float]:
    """What asks how much is allocated; without glibc, how much the process holds, gaps between allocations included."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        process = psutil.Process()
        return lambda: float(process.memory_info().rss)
    mallinfo.restype = _Mallinfo

    def used() -> float:
        found = mallinfo()
        return float(found.uordblks + found.hblkhd)

    return used


def main() -> None:
    """One simulation; see the top of this file."""
    began = time.perf_counter()
    import torch  # noqa: F401  # timed

    imported = time.perf_counter()
    from fedge import RunConfig
    from fedge.task import load_task
    from fedge_sim import simulate as simulated

    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--engine", default="auto")
    given = parser.parse_args()
    run = RunConfig.load(given.run)
    committed: list[float] = []
    used: list[float] = []
    used_bytes = _used_bytes()

    def look(_: object) -> None:
        committed.append(time.perf_counter())
        used.append(used_bytes())

    task = load_task(run.task)
    result = simulated(run, task=task, clients=given.clients, engine=given.engine, callbacks=[look])
    print(
        json.dumps(
            {
                "history_seconds": [float(row.seconds) for row in result.history],
                "period_seconds": [later - earlier for earlier, later in pairwise(committed)],
                "used_bytes": used,
                "import_seconds": imported - began,
                "first_round_seconds": committed[0] - imported,
            }
        )
    )


if __name__ == "__main__":
    main()
