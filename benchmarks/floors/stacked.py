"""W2, for information: the cohort stacked by hand, every client's MLP in one batched matrix product.

    python -m benchmarks.floors.stacked [--rounds N]

The best known way on a CPU, written for this one model: backward pass and all. Prints as loop.py does.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot

from benchmarks.tasks import w2
from benchmarks.tasks.workload import W2

BATCHES = W2.examples // W2.batch_size


def step(
    parameters: list[torch.Tensor], rows: torch.Tensor, wanted: torch.Tensor, learning_rate: float
) -> None:
    """One SGD step of C models on C batches: weights [C, in, out], biases [C, 1, out], rows [C, B, in]."""
    w1, b1, w2_, b2 = parameters
    hidden = torch.baddbmm(b1, rows, w1).relu_()
    output = torch.baddbmm(b2, hidden, w2_)
    slope = torch.softmax(output, dim=2).sub_(wanted).div_(rows.shape[1])
    below = torch.bmm(slope, w2_.transpose(1, 2)).mul_(hidden > 0)
    torch.baddbmm(w2_, hidden.transpose(1, 2), slope, alpha=-learning_rate, out=w2_)
    torch.baddbmm(w1, rows.transpose(1, 2), below, alpha=-learning_rate, out=w1)
    b2.sub_(slope.sum(1, keepdim=True), alpha=learning_rate)
    b1.sub_(below.sum(1, keepdim=True), alpha=learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = W2
    examples = [w2.examples(index) for index in range(workload.clients)]
    rows = torch.stack([rows for rows, _ in examples])
    wanted = one_hot(torch.stack([labels for _, labels in examples]), 10).float()
    layers = [layer for layer in w2.model().children() if isinstance(layer, nn.Linear)]
    model = [part for layer in layers for part in (layer.weight.detach().T, layer.bias.detach()[None, :])]
    model = [part.contiguous() for part in model]
    stacked = [torch.empty(workload.cohort, *part.shape) for part in model]
    cohorts, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(given.rounds):
        began = time.perf_counter()
        cohort = torch.from_numpy(cohorts.choice(workload.clients, workload.cohort, replace=False))
        order = torch.rand(workload.cohort, workload.examples, generator=generator).argsort(1)
        for stack, part in zip(stacked, model, strict=True):
            stack.copy_(part)
        for positions in order.chunk(BATCHES, dim=1):
            picked = (cohort[:, None], positions)
            step(stacked, rows[picked], wanted[picked], workload.learning_rate)
        for stack, part in zip(stacked, model, strict=True):
            torch.mean(stack, dim=0, out=part)  # all clients have as many examples
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
