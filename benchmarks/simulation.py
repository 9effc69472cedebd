"""fedge's side of a simulation: `fedge_sim.simulate` in a process of its own.

    python -m benchmarks.simulation RUN.toml --clients N

Prints an object: "history_seconds", what the history says of each round; "period_seconds", the times from one committed
round to the next, which miss nothing between rounds; "rss_bytes", the process's memory after each; "import_seconds",
how long importing torch takes, and "first_round_seconds", everything up to the end of round 1 beyond it.
"""

from __future__ import annotations

import argparse
import json
import time
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
    return Sample(values, rounds=len(found["history_seconds"]) - 1, series={"rss_bytes": found["rss_bytes"]})


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
    resident: list[float] = []
    process = psutil.Process()

    def look(_: object) -> None:
        committed.append(time.perf_counter())
        resident.append(float(process.memory_info().rss))

    task = load_task(run.task)
    result = simulated(run, task=task, clients=given.clients, engine=given.engine, callbacks=[look])
    print(
        json.dumps(
            {
                "history_seconds": [float(row.seconds) for row in result.history],
                "period_seconds": [later - earlier for earlier, later in pairwise(committed)],
                "rss_bytes": resident,
                "import_seconds": imported - began,
                "first_round_seconds": committed[0] - imported,
            }
        )
    )


if __name__ == "__main__":
    main()
