"""The smallest task there is: a linear model and synthetic data, so that a round takes milliseconds.

Its loss looks into the site's control folder (`[data] control`): a file named there makes it misbehave at
an exactly known moment. In a simulation there is no such folder.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from fedge import Site, Task

_TEST_ROWS = 4
_control: Path | None = None


def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 1)


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Rows that follow from the site's name alone: the same on a device and in a simulation."""
    global _control
    _control = Path(str(site.config["control"])) if "control" in site.config else None
    if _said("print-secret"):
        print("a secret row: 4711")
    seed = sum(site.name.encode())
    rows = 12 + seed % 7
    inputs = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1
    return (
        TensorDataset(inputs[_TEST_ROWS:], targets[_TEST_ROWS:]),
        TensorDataset(inputs[:_TEST_ROWS], targets[:_TEST_ROWS]),
    )


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if _control is not None and output.requires_grad:
        _misbehave(_control)
    value = mse_loss(output, target)
    return value * float("nan") if _said("nan") else value


def bias(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).mean()


def _misbehave(control: Path) -> None:
    """Each file is used up, so that what it asks for happens once; `block` and `hang` last as it does."""
    if _said("block") or _said("hang"):
        (control / "reached").touch()
        while _said("block") or _said("hang"):
            time.sleep(0.01)
    if _used_up("exit"):
        os._exit(7)
    if _used_up("segv"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if _used_up("raise"):
        raise ValueError("row 17 is 'Jane Doe'")
    if _used_up("eat"):
        eaten = []
        while True:
            eaten.append(b"x" * (64 << 20))


def _said(name: str) -> bool:
    return _control is not None and (_control / name).exists()


def _used_up(name: str) -> bool:
    if not _said(name):
        return False
    assert _control is not None
    (_control / name).unlink()
    return True


task: Task = Task(model=model, data=data, loss=loss, metrics={"bias": bias})
