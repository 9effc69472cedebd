"""The tiny task with a model that is too large to ride inline: its vectors are fetched and delivered."""

from __future__ import annotations

import torch
from tiny import bias, data, loss

from fedge import Task


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 6000), torch.nn.Tanh(), torch.nn.Linear(6000, 1))


task: Task = Task(model=model, data=data, loss=loss, metrics={"bias": bias})
