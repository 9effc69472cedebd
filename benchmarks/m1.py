"""M1: the memory of an agent at rest. The floor is a process with the same imports that does nothing."""

from __future__ import annotations

import psutil

from benchmarks import fedge_side
from benchmarks.measure import FEDGE, FLOOR, Case, Goal, Options, Sample, Side, memory
from benchmarks.processes import module, run_json
from benchmarks.tasks.workload import D1

_LIMIT_MB = 75.0
_ROUNDS = 2


def cases(options: Options) -> list[Case]:
    def floor() -> Sample:
        log = options.scratch / "imports.log"
        found, _ = run_json(module("benchmarks.floors.imports"), log=log, deadline_s=60)
        return Sample({"rss_bytes": float(found["rss_bytes"])})

    def fedge() -> Sample:
        """At rest before any run, and after a run, when the worker is there and warm."""
        work = {"steps": 1, "batch_size": D1.batch_size}
        run = fedge_side.run_toml("benchmarks.tasks.d1:task", rounds=_ROUNDS, cohort=1, work=work)
        with fedge_side.deployment("m1", clients=1, options=options) as deployed:
            pid = deployed.agents[0].pid
            at_rest, children = memory(pid, "VmRSS"), _children(pid)
            deployed.run(run, rounds=_ROUNDS, deadline_s=300)
            return Sample(
                {
                    "rss_bytes": float(at_rest),
                    "worker_at_rest_rss_bytes": float(children),
                    "after_run_rss_bytes": float(memory(pid, "VmRSS")),
                    "worker_after_run_rss_bytes": float(_children(pid)),
                }
            )

    return [
        Case(
            "M1",
            "an agent at rest, without its worker",
            (Side.of(FLOOR, floor), Side.of(FEDGE, fedge)),
            (
                Goal(
                    "resident memory before any run",
                    _LIMIT_MB,
                    lambda found: found.spread(FEDGE, "rss_bytes", per=1e6),
                    "MB",
                ),
                Goal(
                    "resident memory after a run",
                    _LIMIT_MB,
                    lambda found: found.spread(FEDGE, "after_run_rss_bytes", per=1e6),
                    "MB",
                ),
            ),
            compares="rss_bytes",
        )
    ]


def _children(pid: int) -> int:
    """The resident memory of the agent's worker, 0 while there is none."""
    return sum(child.memory_info().rss for child in psutil.Process(pid).children(recursive=True))
