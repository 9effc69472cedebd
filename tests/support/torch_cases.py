"""Tiny models, data and calls that the tests of the trainer share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedge import Task
from fedge.run import Work
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer

SEED = 11


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def task_of(
    model: Callable[[], Any],
    loss: Callable[[Any, Any], Any] = F.cross_entropy,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
) -> Task:
    return Task(model=model, data=lambda site: (None, None), loss=loss, metrics=metrics or {})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def noisy() -> nn.Module:
    """Everything that could remember: dropout, batch statistics, an integer counter."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def rows(size: int = 21, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (
        torch.randn(size, 6, generator=generator),
        torch.randint(3, (size,), generator=generator),
    )
    return TensorDataset(inputs, targets)


def start_of(task: Task) -> Array:
    return framework.initial_model(task, seed=SEED).vector


def train(
    trainer: Trainer, model: Array, work: Work, *, data: Any = None, seed: int = 5
) -> tuple[Array, Outcome]:
    out = np.empty_like(model)
    outcome = trainer.train(model, rows() if data is None else data, work, seed=seed, out=out)
    return out, outcome


def gradient(
    trainer: Trainer, model: Array, work: Work, *, data: Any = None, seed: int = 5, step: int = 0
) -> tuple[Array, Outcome]:
    out = np.empty_like(model)
    outcome = trainer.gradient(model, rows() if data is None else data, work, seed=seed, step=step, out=out)
    return out, outcome


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.999), eps=1e-8),
}
