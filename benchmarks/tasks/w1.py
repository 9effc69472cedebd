"""W1: 100 clients x 32 images 3x32x32, 10 classes; a small CNN of 1.63M parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from benchmarks.tasks.workload import W1, index_of
from fedge import Site, Task


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12544, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def examples(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images float32[32, 3, 32, 32] and labels int64[32], a function of the client's index."""
    generator = torch.Generator().manual_seed(1_000_000 + index)
    images = torch.randn(W1.examples, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (W1.examples,), generator=generator)


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    images, labels = examples(index_of(site))
    return TensorDataset(images, labels), TensorDataset(images[:2], labels[:2])


task = Task(model=model, data=data, loss=cross_entropy)
