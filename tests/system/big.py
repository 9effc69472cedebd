"""The tiny task with a model of six megabytes: its vectors take several chunks, and a while on a slow link."""

from __future__ import annotations

import torch
from tiny import bias, data, loss

from fedge import Task


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 300_000), torch.nn.Tanh(), torch.nn.Linear(300_000, 1))


task: Task = Task(model=model, data=data, loss=loss, metrics={"bias": bias})
