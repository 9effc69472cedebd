"""D2: rounds of 100 MB (and 400 MB) with 2 clients. The floor is a bare grpc.aio round, same traffic."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks import fedge_side
from benchmarks.exchanges import exchange
from benchmarks.loops import training
from benchmarks.measure import (
    FEDGE,
    FLOOR,
    Case,
    Goal,
    Options,
    Outcome,
    Sample,
    Side,
    Spread,
    forget_peak,
    memory,
)
from benchmarks.tasks.workload import D2, D2_BYTES

_ROUND, _MEMORY = 1.25, 2.5


def cases(options: Options) -> list[Case]:
    sizes = {"task": D2_BYTES, **({"large": 4 * D2_BYTES} if options.large else {})}
    return [_case(attribute, payload, options) for attribute, payload in sizes.items()]


def _case(attribute: str, payload: int, options: Options) -> Case:
    rounds = 4 if options.quick else 6
    work = {"steps": 1, "batch_size": D2.batch_size, "learning_rate": D2.learning_rate}
    task = f"benchmarks.tasks.d2:{attribute}"
    run = fedge_side.run_toml(task, rounds=rounds, cohort=D2.clients, work=work)

    def fedge() -> Sample:
        """A fresh deployment each time: what its server's memory was before counts."""
        name = "d2" if attribute == "task" else "d2-large"
        alone = training(name, steps=rounds, options=options, processes=D2.clients)
        with ExitStack() as stack:
            deployed = stack.enter_context(fedge_side.deployment(name, clients=D2.clients, options=options))
            pid = deployed.server.pid
            forget_peak(pid)
            before = memory(pid, "VmRSS")
            finished = deployed.run(run, rounds=rounds, deadline_s=600)
            peak = memory(pid, "VmHWM")
        values = finished.values()
        values |= {
            "training_seconds": alone,
            "without_training_seconds": values["seconds"] - alone,
            "server_before_bytes": float(before),
            "server_growth_bytes": float(peak - before),
        }
        return Sample(values, rounds=rounds - 1)

    def floor() -> Sample:
        return exchange(clients=D2.clients, rounds=rounds, payload=payload, options=options)

    def net(found: Outcome) -> Spread | None:
        return found.compare(
            FEDGE, FLOOR, lambda a, b: a.values["without_training_seconds"] / b.values["seconds"]
        )

    def growth(found: Outcome) -> Spread | None:
        return found.spread(FEDGE, "server_growth_bytes", per=payload)

    return Case(
        f"D2-{payload // 1_000_000}MB",
        f"2 clients return {payload // 1_000_000} MB",
        (Side.of(FLOOR, floor), Side.of(FEDGE, fedge)),
        (
            Goal("a round without its training step, of the bare round", _ROUND, net),
            Goal("the server's peak beyond itself, in models", _MEMORY, growth),
        ),
    )
