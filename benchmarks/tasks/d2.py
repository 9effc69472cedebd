"""D2: a model of 25M parameters (100 MB; 400 MB in `large`) whose every value changes in one cheap step.

The loss is the sum of all parameters times the batch's mean: one read of the model forward, a gradient
that is one number everywhere, and the optimiser's own pass. The model differs after every round, so
that nothing of it can be known from the round before.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.tasks.marks import Marks
from benchmarks.tasks.workload import D2_BYTES, index_of
from fedge import Site, Task

_marks = Marks()


class Bulk(nn.Module):
    """One vector of parameters; its output is their sum times the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bulk = nn.Parameter(torch.linspace(-1.0, 1.0, size))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.bulk.sum()


def model() -> nn.Module:
    return Bulk(D2_BYTES // 4)


def model_large() -> nn.Module:
    return Bulk(D2_BYTES)


def examples(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random numbers float32[2], and two more that nothing depends on."""
    generator = torch.Generator().manual_seed(4_000_000 + index)
    return torch.rand(2, generator=generator), torch.zeros(2)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).mean()


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    _marks.open(site)
    train = TensorDataset(*examples(index_of(site)))
    return train, train


task = Task(model=model, data=data, loss=_marks.around(loss))
large = Task(model=model_large, data=data, loss=_marks.around(loss))
