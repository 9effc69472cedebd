"""D3: torch DistributedDataParallel over gloo on the W1 CNN, batch 16, one thread a process.

    python -m benchmarks.floors.ddp --rank R --world N --store FILE [--steps N]

Unencrypted, on loopback. Also times the same steps without the exchange, in all processes at once.
Rank 0 prints {"seconds": [...], "compute_seconds": [...]}, a number a step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import w1
from benchmarks.tasks.workload import D3

_DEADLINE = timedelta(seconds=120)


def steps(module: nn.Module, *, rank: int, count: int) -> list[float]:
    """Seconds for each of `count` SGD steps on shuffled batches of this rank's examples."""
    images, labels = w1.examples(rank)
    optimizer = torch.optim.SGD(module.parameters(), lr=D3.learning_rate)
    generator = torch.Generator().manual_seed(rank)
    size, batch = len(images), D3.batch_size
    seconds = []
    shuffled = torch.randperm(size, generator=generator)
    for number in range(count):
        began = time.perf_counter()
        at = number * batch % size
        if at == 0:
            shuffled = torch.randperm(size, generator=generator)
        positions = shuffled[at : at + batch]
        optimizer.zero_grad()
        loss = cross_entropy(module(images[positions]), labels[positions])
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{given.store}",
        rank=given.rank,
        world_size=given.world,
        timeout=_DEADLINE,
    )
    torch.manual_seed(0)
    module = w1.model()
    dist.barrier()
    compute = steps(module, rank=given.rank, count=given.steps)
    dist.barrier()
    together = steps(nn.parallel.DistributedDataParallel(module), rank=given.rank, count=given.steps)
    dist.destroy_process_group()
    if given.rank == 0:
        print(json.dumps({"seconds": together, "compute_seconds": compute}))


if __name__ == "__main__":
    main()
