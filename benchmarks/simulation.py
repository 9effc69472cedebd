"""fedge's side of a simulation: `fedge_sim.simulate` in a process of its own.

    python -m benchmarks.simulation RUN.toml --clients N

Prints {"history_seconds": [...], "period_seconds": [...]}: what the history says of each round, and the
times from one committed round to the next, which miss nothing between rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.measure import Options, Sample, round_seconds
from benchmarks.processes import module, run_json


def simulate(run: str, *, name: str, clients: int, options: Options) -> Sample:
    """One simulation in a fresh process: seconds a round without the first, and the peak of its memory."""
    path = options.scratch / f"{name}.toml"
    path.write_text(run)
    began = time.monotonic()
    found, peak = run_json(
        module("benchmarks.simulation", path, "--clients", clients),
        log=options.scratch / f"{name}.log",
        deadline_s=900,
    )
    values = round_seconds(found["history_seconds"], found["period_seconds"])
    values |= {"process_seconds": time.monotonic() - began, "peak_rss_bytes": float(peak)}
    return Sample(values, rounds=len(found["history_seconds"]) - 1)


def main() -> None:
    """One simulation; see the top of this file."""
    from fedge import RunConfig
    from fedge.task import load_task
    from fedge_sim import simulate as simulated

    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, required=True)
    given = parser.parse_args()
    run = RunConfig.load(given.run)
    committed: list[float] = []
    result = simulated(
        run,
        task=load_task(run.task),
        clients=given.clients,
        callbacks=[lambda _: committed.append(time.perf_counter())],
    )
    print(
        json.dumps(
            {
                "history_seconds": [float(row.seconds) for row in result.history],
                "period_seconds": [later - earlier for earlier, later in pairwise(committed)],
            }
        )
    )


if __name__ == "__main__":
    main()
