"""Handwritten digits: 1797 images of 8 x 8 pixels (Alpaydin and Kaynak 1998), from scikit-learn.

A fifth is held out to judge models by; `[simulation] partition` divides the rest among clients.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedge import Site, Task

_HELD_OUT = 0.2
_SEED = 5


def model() -> torch.nn.Module:
    """A linear one: fewer parameters, and so less noise for the same privacy."""
    return torch.nn.Linear(64, 10)


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    return _part(held_out=False), _part(held_out=True)


def held_out() -> TensorDataset:
    """Images that no client has."""
    return _part(held_out=True)


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(dim=1) == target).float().mean()


def _part(*, held_out: bool) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SEED).permutation(len(labels))
    cut = round(len(order) * _HELD_OUT)
    members = order[:cut] if held_out else order[cut:]
    return TensorDataset(
        torch.tensor(images[members] / 16 - 0.3, dtype=torch.float32), torch.tensor(labels[members])
    )


task: Task = Task(model=model, data=data, loss=cross_entropy, metrics={"accuracy": accuracy})
