"""W2: 1000 clients x 20 rows of 60 features, 10 classes; an MLP 60-64-10."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from benchmarks.tasks.workload import W2, index_of
from fedge import Site, Task


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(60, 64), nn.ReLU(), nn.Linear(64, 10))


def examples(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows float32[20, 60] and labels int64[20], a function of the client's index."""
    generator = torch.Generator().manual_seed(2_000_000 + index)
    rows = torch.randn(W2.examples, 60, generator=generator)
    return rows, torch.randint(10, (W2.examples,), generator=generator)


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    rows, labels = examples(index_of(site))
    return TensorDataset(rows, labels), TensorDataset(rows[:2], labels[:2])


task = Task(model=model, data=data, loss=cross_entropy)
