"""Small runs, and tasks that another process can import by name, as the workers of a simulation do."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedge import RunConfig, Site, Task


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Client i has 4 + 3 i examples."""
    generator = torch.Generator().manual_seed(site.index or 0)
    size = 4 + 3 * (site.index or 0)
    inputs = torch.randn(size, 6, generator=generator)
    labels = (inputs[:, :3].argmax(1) + (inputs[:, 4] > 1)) % 3
    return TensorDataset(inputs, labels), TensorDataset(inputs[:3], labels[:3])


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def convolution() -> nn.Module:
    """Writes over what it has made itself."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


task = Task(model=perceptron, data=data, loss=F.cross_entropy, metrics={"accuracy": accuracy})


def forgetful() -> nn.Module:
    """Draws random numbers, and remembers."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


layered = Task(model=forgetful, data=data, loss=F.cross_entropy)


def _except_at(index: int, happens: Callable[[], Any]) -> Callable[[Site], Any]:
    def others(site: Site) -> Any:
        train, test = data(site)
        return (happens() if site.index == index else train), test

    return others


unreadable = Task(model=perceptron, data=_except_at(4, list), loss=F.cross_entropy)


def _killed() -> None:
    """As the system does that has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


deadly = Task(model=perceptron, data=_except_at(7, _killed), loss=F.cross_entropy)


def _said(site: Site) -> Any:
    ctypes.CDLL(None).puts(b"as a library does that is written in C")
    print("by a handler of old", file=sys.__stdout__)
    print("the data of", site.name)
    return data(site)


talkative = Task(model=perceptron, data=_said, loss=F.cross_entropy)


def broad() -> nn.Module:
    """So large that an update of it lies on the node of a cluster that made it."""
    return nn.Sequential(nn.Linear(6, 12000), nn.ReLU(), nn.Linear(12000, 3))


wide = Task(model=broad, data=data, loss=F.cross_entropy)


def uneven_data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Client 0 has examples of another type."""
    train, test = data(site)
    inputs, labels = train.tensors
    return TensorDataset(inputs.double() if site.index == 0 else inputs, labels), test


class Rounding(nn.Module):
    """Takes numbers of any type."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(inputs.float())
        return found


uneven = Task(model=Rounding, data=uneven_data, loss=F.cross_entropy)


def diverging(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """NaN at those who have more than twenty examples."""
    return F.cross_entropy(output, target) * (torch.nan if len(target) > 20 else 1.0)


lost = Task(model=perceptron, data=data, loss=diverging)


def dead_data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Client 0 has nothing that any unit of `dead_model` answers to."""
    train, test = data(site)
    inputs, labels = train.tensors
    return TensorDataset(torch.full_like(inputs, -100.0) if site.index == 0 else inputs, labels), test


def dead_model() -> nn.Module:
    first, last = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        first.weight.abs_()
    return nn.Sequential(first, nn.ReLU(), last)


dead = Task(model=dead_model, data=dead_data, loss=F.cross_entropy)


def here() -> Path:
    return Path(__file__).parent


def config(task: str = "simulated:task", **tables: Any) -> RunConfig:
    """Four rounds of six of eight clients; `tables` take the place of a run's own."""
    table = {
        "name": "trial",
        "task": task,
        "rounds": 4,
        "seed": 5,
        "work": {"epochs": 2, "batch_size": 4, "learning_rate": 0.05},
        "cohort": {"size": 6},
        "simulation": {"clients": 8},
        **tables,
    }
    return RunConfig.from_table(table, source="run")


FAULTS = {"dropout": 0.1, "failure": 0.1, "straggler": 0.1, "corruption": 0.1, "crash_every": 17}
SCAFFOLD = {"name": "scaffold", "clients": 8}
STEPS = {"steps": 3, "batch_size": 4, "learning_rate": 0.05}
PERSONAL = {"epochs": 2, "batch_size": 4, "learning_rate": 0.05, "personal": ["2.*"]}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradients": {"strategy": {"name": "mirrored_sgd"}},
    "median": {"strategy": {"name": "fedavg", "aggregation": "median"}},
    "faults": {
        "cohort": {"size": 6, "quorum": 3, "over_select": 1.3, "attempts": 20},
        "simulation": {"clients": 8, "faults": FAULTS},
    },
    "adversaries": {"simulation": {"clients": 8, "adversaries": {"share": 0.3, "attack": "noise"}}},
    "private clients": {
        "privacy": {"unit": "client", "epsilon": 50.0, "delta": 1e-3, "clip": 0.1},
        "evaluation": {"every": 0},
    },
    "secure sums": {"secure_aggregation": {"enabled": True, "bound": 2.0}},
    "private examples": {"privacy": {"unit": "example", "epsilon": 50.0, "delta": 1e-3, "clip": 1.0}},
    "control variates": {"strategy": SCAFFOLD, "work": STEPS},
    "control variates and faults": {
        "strategy": SCAFFOLD,
        "work": STEPS,
        "cohort": {"size": 6, "quorum": 3, "over_select": 1.3, "attempts": 20},
        "simulation": {"clients": 8, "faults": FAULTS},
    },
    "control variates of private examples": {
        "strategy": SCAFFOLD,
        "work": STEPS,
        "privacy": {"unit": "example", "epsilon": 50.0, "delta": 1e-3, "clip": 1.0},
    },
    "personal layers": {"work": PERSONAL},
    "personal layers and faults": {
        "work": PERSONAL | {"proximal": 0.1, "optimizer": "adam"},
        "cohort": {"size": 6, "quorum": 3, "over_select": 1.3, "attempts": 20},
        "simulation": {"clients": 8, "faults": FAULTS},
    },
    "personal layers and secure sums": {
        "work": PERSONAL,
        "secure_aggregation": {"enabled": True, "bound": 2.0},
    },
    "personal layers of private examples": {
        "work": PERSONAL,
        "privacy": {"unit": "example", "epsilon": 50.0, "delta": 1e-3, "clip": 1.0},
    },
}
"""Tables of a run in which every part of a simulation has something to do."""

SPREAD_DEVICES = {
    "compute": {"median": 2.0, "sigma": 0.8},
    "up_mbps": {"low": 0.01, "high": 0.1},
    "dropout": 0.1,
}
