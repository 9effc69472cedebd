"""P1: training steps of W1's model with batches of 64, plain or private; each way by itself in a process.

    python -m benchmarks.floors.private_step plain|hooks|ghost|fedge [--threads N] [--steps N]

Prints {"seconds": [...], "peak_bytes": N, "growth_bytes": N}: a number a step, the first ones included; the peak of
resident memory, and by how much that is more than there was before the first step, with model and data
loaded. `hooks` and `ghost` are Opacus's two ways, with its own optimiser and noise; `fedge` is the client's
trainer, with its sampler, noise and flat model.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from benchmarks.measure import forget_peak, memory
from benchmarks.tasks.w1 import model, task

BATCH, BATCHES = 64, 10
CLIP, SIGMA, RATE = 1.0, 1.0, 0.05

Step = Callable[[torch.Tensor, torch.Tensor], object]


def plain() -> Step:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(module(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def hooks() -> Step:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = GradSampleModule(model())
    inner = torch.optim.SGD(module.parameters(), lr=RATE)
    optimizer = DPOptimizer(inner, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=BATCH)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(module(inputs), targets).backward()
        optimizer.step()

    return step


def ghost() -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    module = GradSampleModuleFastGradientClipping(model(), max_grad_norm=CLIP, use_ghost_clipping=True)
    inner = torch.optim.SGD(module.parameters(), lr=RATE)
    optimizer = DPOptimizerFastGradientClipping(
        inner, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=BATCH
    )
    loss = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss(), "mean")

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(module(inputs), targets).backward()
        optimizer.step()

    return step


def by_hand(step: Step, data: TensorDataset, steps: int) -> Iterator[float]:
    """Seconds of each of so many steps, on batches that are copied out of the data as any loader does."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = data.tensors
    for _ in range(steps):
        began = time.perf_counter()
        rows = torch.randperm(len(inputs), generator=generator)[:BATCH]
        step(inputs[rows], targets[rows])
        yield time.perf_counter() - began


def by_fedge(data: TensorDataset, steps: int) -> Callable[[], Iterator[float]]:
    """The trainer, ready: it has imported what it needs, and found out how to make per-example gradients."""
    import numpy as np

    from fedge.privacy.example import ExampleLevel
    from fedge.privacy.secure import SecureSource
    from fedge.run import Work
    from fedge_client.torch.framework import framework
    from fedge_client.torch.private.steps import Private
    from fedge_client.torch.trainer import Trainer

    begun = framework.initial_model(task, seed=0).vector
    trainer, out = Trainer(task, seed=0), np.empty_like(begun)
    trainer.prepare_private(begun, data)
    private = Private(ExampleLevel(CLIP, SIGMA), SecureSource(os.urandom(32)))
    work = Work(batch_size=BATCH, steps=steps, learning_rate=RATE)

    def train() -> Iterator[float]:
        marks = [time.perf_counter()]
        trainer.train(
            begun,
            data,
            work,
            seed=0,
            out=out,
            progress=lambda *_: marks.append(time.perf_counter()),
            private=private,
        )
        yield from (after - before for before, after in pairwise(marks))

    return train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("plain", "hooks", "ghost", "fedge"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    size = BATCH * BATCHES
    data = TensorDataset(torch.randn(size, 3, 32, 32), torch.randint(10, (size,)))
    if given.way == "fedge":
        run = by_fedge(data, given.steps)
    else:
        step = {"plain": plain, "hooks": hooks, "ghost": ghost}[given.way]()
        run = partial(by_hand, step, data, given.steps)
    forget_peak(os.getpid())
    before = memory(os.getpid(), "VmRSS")
    seconds = list(run())
    peak = memory(os.getpid(), "VmHWM")
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "growth_bytes": peak - before}))


if __name__ == "__main__":
    main()
