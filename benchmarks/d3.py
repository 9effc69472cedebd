"""D3: mirrored SGD between 2 clients on W1's CNN. The floor is torch's DDP over gloo, unencrypted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import fedge_side
from benchmarks.measure import FEDGE, FLOOR, Case, Goal, Options, Sample, Side, Take, after_warm_up
from benchmarks.processes import finish, last_line, module, started
from benchmarks.tasks.workload import D3

_GOAL = 2.5
_DEADLINE_S = 300


def cases(options: Options) -> list[Case]:
    steps = 20 if options.quick else 100

    @contextmanager
    def fedge() -> Iterator[Take]:
        with fedge_side.deployment("d3", clients=D3.clients, options=options) as deployed:
            deployed.run(_run(2), rounds=2, deadline_s=_DEADLINE_S)  # the workers import torch

            def take() -> Sample:
                finished = deployed.run(_run(steps), rounds=steps, deadline_s=_DEADLINE_S)
                return Sample(finished.values(), rounds=steps - 1)

            yield take

    return [
        Case(
            "D3",
            "mirrored SGD, 2 clients, CNN of 1.63M parameters, batch 16",
            (Side.of(FLOOR, lambda: ddp(steps, options)), Side(FEDGE, fedge)),
            (Goal("a step, of DDP's", _GOAL, lambda found: found.ratio(FLOOR)),),
        )
    ]


def ddp(steps: int, options: Options) -> Sample:
    """Seconds a step of DDP, and of its computation alone."""
    with TemporaryDirectory(dir=options.scratch) as name, ExitStack() as stack:
        ranks = []
        for rank in range(D3.clients):
            log = Path(name) / f"rank-{rank}.log"
            sizes = ("--rank", rank, "--world", D3.clients, "--steps", steps)
            arguments = module("benchmarks.floors.ddp", *sizes, "--store", Path(name) / "store")
            ranks.append((stack.enter_context(started(arguments, log=log)), log))
        for process, log in ranks:
            finish(process, log=log, deadline_s=_DEADLINE_S)
        found = json.loads(last_line(ranks[0][1]))
    return Sample(
        {
            "seconds": after_warm_up(found["seconds"]),
            "compute_seconds": after_warm_up(found["compute_seconds"]),
        },
        rounds=steps - 1,
    )


def _run(rounds: int) -> str:
    work = {"batch_size": D3.batch_size, "learning_rate": D3.learning_rate}
    return fedge_side.run_toml(
        "benchmarks.tasks.d3:task", rounds=rounds, cohort=D3.clients, work=work, strategy="mirrored_sgd"
    )
