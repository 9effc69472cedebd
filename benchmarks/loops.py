"""The floors of W1 and W2: runs floors/loop.py and floors/stacked.py, and reads what they print."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

from benchmarks.measure import Options, Sample, after_warm_up
from benchmarks.processes import finish, last_line, module, run_json, started

_DEADLINE_S = 900


def loop(name: str, *, rounds: int, options: Options, threads: int = 1, processes: int = 1) -> Sample:
    """The bare loop: seconds a round without the first, and the peak of its memory."""
    sizes = ("--rounds", rounds, "--threads", threads, "--processes", processes)
    return _sample(module("benchmarks.floors.loop", name, *sizes), options)


def stacked(*, rounds: int, options: Options) -> Sample:
    """W2's cohort stacked by hand."""
    return _sample(module("benchmarks.floors.stacked", "--rounds", rounds), options)


def training(task: str, *, steps: int, options: Options, processes: int = 1) -> float:
    """What a site's training costs alone, in seconds a step; the slowest of `processes` at once."""
    arguments = module("benchmarks.floors.step", task, "--steps", steps)
    logs = [options.scratch / f"training-{number}.log" for number in range(processes)]
    with ExitStack() as stack:
        sites = [stack.enter_context(started(arguments, log=log)) for log in logs]
        for site, log in zip(sites, logs, strict=True):
            finish(site, log=log, deadline_s=_DEADLINE_S)
    return max(after_warm_up(json.loads(last_line(log))["seconds"]) for log in logs)


def _sample(arguments: list[str], options: Options) -> Sample:
    began = time.monotonic()
    found, peak = run_json(arguments, log=options.scratch / "loop.log", deadline_s=_DEADLINE_S)
    return Sample(
        {
            "seconds": after_warm_up(found["seconds"]),
            "process_seconds": time.monotonic() - began,
            "peak_rss_bytes": float(peak),
        },
        rounds=len(found["seconds"]) - 1,
    )
