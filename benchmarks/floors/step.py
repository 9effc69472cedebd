"""D1, D2, for information: the cost of the training alone, in a plain torch loop, one thread.

    python -m benchmarks.floors.step d1|d2|d2-large [--steps N]

One step is what a site does a round: load the model into the resident module, one SGD step, and the
difference. Prints {"seconds": [...]}, a number a step.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.floors.loop import Resident
from benchmarks.tasks import d1, d2
from benchmarks.tasks.workload import D1, D2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["d1", "d2", "d2-large"])
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task, workload, examples = {
        "d1": (d1.task, D1, d1.examples),
        "d2": (d2.task, D2, d2.examples),
        "d2-large": (d2.large, D2, d2.examples),
    }[given.task]
    resident = Resident.of(task.model(), learning_rate=workload.learning_rate, seed=0)
    model, update = resident.flat.clone(), torch.empty_like(resident.flat)
    rows, target = examples(0)
    seconds = []
    for _ in range(given.steps):
        began = time.perf_counter()
        resident.flat.copy_(model)
        resident.optimizer.zero_grad()
        output = resident.module(rows[: workload.batch_size])
        task.loss(output, target[: workload.batch_size]).backward()
        resident.optimizer.step()
        torch.sub(resident.flat, model, out=update)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
