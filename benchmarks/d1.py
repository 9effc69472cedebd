"""D1: rounds of 10 kB with 2 and 10 clients. The floor is a bare grpc.aio round with the same traffic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import fedge_side
from benchmarks.exchanges import exchange
from benchmarks.loops import training
from benchmarks.measure import FEDGE, FLOOR, Case, Goal, Options, Sample, Side, Take
from benchmarks.tasks.workload import D1, D1_BYTES

_GOAL_S = {2: 0.005, 10: 0.015}
_FIRST_STEP_S = 1.0


def cases(options: Options) -> list[Case]:
    return [_case(clients, options) for clients in _GOAL_S]


def _case(clients: int, options: Options) -> Case:
    rounds = 50 if options.quick else 200

    def floor() -> Sample:
        return exchange(clients=clients, rounds=rounds, payload=D1_BYTES, options=options)

    @contextmanager
    def fedge() -> Iterator[Take]:
        with fedge_side.deployment("d1", clients=clients, options=options) as deployed:
            deployed.run(_run(clients, rounds=2), rounds=2, deadline_s=300)  # the workers import torch

            def take() -> Sample:
                finished = deployed.run(_run(clients, rounds=rounds), rounds=rounds, deadline_s=300)
                return Sample(finished.values(), rounds=rounds - 1)

            yield take

    def alone() -> Sample:
        return Sample({"seconds": training("d1", steps=rounds, options=options)}, rounds=rounds - 1)

    return Case(
        f"D1-{clients}",
        f"{clients} clients return 10 kB at once",
        (Side.of(FLOOR, floor), Side(FEDGE, fedge), Side.of("the training alone", alone)),
        (
            Goal("a round", _GOAL_S[clients], lambda found: found.spread(FEDGE, "seconds"), "s"),
            Goal(
                "submit to the first training step, worker warm",
                _FIRST_STEP_S,
                lambda found: found.spread(FEDGE, "submit_to_first_step_seconds"),
                "s",
            ),
        ),
    )


def _run(clients: int, *, rounds: int) -> str:
    work = {"steps": 1, "batch_size": D1.batch_size, "learning_rate": D1.learning_rate}
    return fedge_side.run_toml("benchmarks.tasks.d1:task", rounds=rounds, cohort=clients, work=work)
