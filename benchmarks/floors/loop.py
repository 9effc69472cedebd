"""W1, W2: FedAvg as a bare loop, one resident model a process; in one process, or split over several.

    python -m benchmarks.floors.loop w1|w2 [--threads N] [--processes N] [--rounds N]

Prints {"seconds": [...]}, a number a round, the first (warm-up) round included. The whole round is timed:
drawing the cohort, loading the model, training, and the mean weighted by examples.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks.workload import W1, W2, Workload

Examples = tuple[torch.Tensor, torch.Tensor]
_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Resident:
    """One model whose parameters are views of `flat`, trained again for each client."""

    flat: torch.Tensor
    module: nn.Module
    optimizer: torch.optim.SGD
    generator: torch.Generator

    @classmethod
    def of(cls, module: nn.Module, *, learning_rate: float, seed: int) -> Resident:
        parameters = list(module.parameters())
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        offset = 0
        for parameter in parameters:
            size = parameter.numel()
            parameter.data = flat[offset : offset + size].view_as(parameter)
            offset += size
        optimizer = torch.optim.SGD(parameters, lr=learning_rate)
        return cls(flat, module, optimizer, torch.Generator().manual_seed(seed))

    def train(self, model: torch.Tensor, examples: Examples, batch_size: int) -> None:
        """One local epoch from `model`, in shuffled batches; the result is in `flat`."""
        inputs, targets = examples
        self.flat.copy_(model)
        shuffled = torch.randperm(len(inputs), generator=self.generator)
        for positions in torch.split(shuffled, batch_size):
            self.optimizer.zero_grad()
            loss = cross_entropy(self.module(inputs[positions]), targets[positions])
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
            self.optimizer.step()


def rounds(
    name: str,
    *,
    count: int,
    rank: int,
    model: torch.Tensor,
    sums: torch.Tensor,
    wait: Callable[[], object],
) -> list[float]:
    """Do `count` rounds as one of `len(sums)` processes that share `model` and `sums`; seconds a round."""
    workload, data = _load(name)
    torch.manual_seed(0)
    resident = Resident.of(_module(name), learning_rate=workload.learning_rate, seed=rank)
    if rank == 0:
        model.copy_(resident.flat)
    cohorts = np.random.default_rng(0)
    mine = sums[rank]
    seconds = []
    for _ in range(count):
        wait()
        began = time.perf_counter()
        cohort = cohorts.choice(workload.clients, workload.cohort, replace=False)
        mine.zero_()
        for client in cohort[rank :: len(sums)]:
            examples = data[int(client)]
            resident.train(model, examples, workload.batch_size)
            mine.add_(resident.flat, alpha=float(len(examples[0])))
        wait()
        if rank == 0:
            torch.sum(sums, dim=0, out=model)
            model.div_(float(sum(len(data[int(client)][0]) for client in cohort)))
        seconds.append(time.perf_counter() - began)
    return seconds


def _load(name: str) -> tuple[Workload, list[Examples]]:
    module = importlib.import_module(f"benchmarks.tasks.{name}")
    workload = {"w1": W1, "w2": W2}[name]
    return workload, [module.examples(index) for index in range(workload.clients)]


def _module(name: str) -> nn.Module:
    module: nn.Module = importlib.import_module(f"benchmarks.tasks.{name}").model()
    return module


def _other(
    name: str, count: int, rank: int, threads: int, model: torch.Tensor, sums: torch.Tensor, barrier: Barrier
) -> None:
    torch.set_num_threads(threads)
    rounds(name, count=count, rank=rank, model=model, sums=sums, wait=lambda: barrier.wait(_DEADLINE_S))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=["w1", "w2"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size = sum(parameter.numel() for parameter in _module(given.workload).parameters())
    model, sums = torch.zeros(size), torch.zeros(given.processes, size)
    if given.processes > 1:  # one process keeps to private memory, whose large pages are faster
        for shared in (model, sums):
            shared.share_memory_()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(given.processes) if given.processes > 1 else None
    others = [
        context.Process(
            target=_other,
            args=(given.workload, given.rounds, rank, given.threads, model, sums, barrier),
            daemon=True,
        )
        for rank in range(1, given.processes)
    ]
    for other in others:
        other.start()
    wait: Callable[[], object] = (lambda: barrier.wait(_DEADLINE_S)) if barrier else (lambda: None)
    seconds = rounds(given.workload, count=given.rounds, rank=0, model=model, sums=sums, wait=wait)
    for other in others:
        other.join(_DEADLINE_S)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
