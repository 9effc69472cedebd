"""A task whose code does what it can to let its data out: it says so in `[data] leak`, for the test to look for."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset

from fedge import Site, Task

SECRET = 4711.375
"""Exact in float32 and float64; in every row, and in whatever the task can put it into."""

NAME = "Jane Doe"
ROWS = 8

_leak = "nothing"


class Model(torch.nn.Module):
    """Linear, with a buffer that training may change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and inputs.sum() > SECRET / 2:  # not while the model is looked at
            if _leak == "parameter":
                with torch.no_grad():
                    self.linear.bias.fill_(SECRET)
            elif _leak == "data":
                self.linear.bias.data = torch.full((1,), SECRET)
            elif _leak == "buffer":
                self.seen.fill_(SECRET)
        return self.linear(inputs / SECRET)


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """The same rows everywhere; every one of them says the secret."""
    global _leak
    _leak = str(site.config.get("leak", "nothing"))
    inputs = torch.full((ROWS, 3), SECRET)
    inputs[:, 1] = torch.linspace(0, SECRET, ROWS)
    rows = TensorDataset(inputs, torch.full((ROWS, 1), SECRET))
    return rows, rows


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if _leak == "error":
        raise ValueError(f"{NAME} has {SECRET}")
    return ((output - target) ** 2).mean()


def secret(output: Any, target: Any) -> float:
    return SECRET


task: Task = Task(model=Model, data=data, loss=loss, metrics={"secret": secret})
