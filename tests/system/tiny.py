"""The smallest task there is: a linear model and synthetic data, so that a round takes milliseconds.

Its loss looks into the site's control folder (`[data] control`), where a test says how it is to misbehave:
so the moment is exactly known. In a simulation there is no such folder.
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
    seed = sum(site.name.encode())
    rows = 12 + seed % 7
    inputs = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1
    return (
        TensorDataset(inputs[_TEST_ROWS:], targets[_TEST_ROWS:]),
        TensorDataset(inputs[:_TEST_ROWS], targets[:_TEST_ROWS]),
    )


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    value = mse_loss(output, target)
    return value * _misbehave(_control) if _control is not None and output.requires_grad else value


def bias(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).mean()


def _misbehave(control: Path) -> float:
    """Do what the next line of the file `script` says, if any; then wait while there is a file `block`.

    What the loss is to be multiplied with.
    """
    deed, script, block = "", control / "script", control / "block"
    if script.exists():
        deed, _, rest = script.read_text().partition("\n")
        script.write_text(rest)
    if deed == "block":
        block.touch()
    elif deed in _DEEDS:
        _DEEDS[deed]()
    if block.exists():
        (control / "reached").touch()
        while block.exists():
            time.sleep(0.01)
    return float("nan") if deed == "nan" else 1.0


def _raise() -> None:
    raise ValueError("row 17 is 'Jane Doe'")


def _eat() -> None:
    eaten = [b"x" * (64 << 20) for _ in range(24)]
    time.sleep(600)
    del eaten


_DEEDS = {
    "exit": lambda: os._exit(7),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "raise": _raise,
    "eat": _eat,
    "hang": lambda: time.sleep(600),
}

task: Task = Task(model=model, data=data, loss=loss, metrics={"bias": bias})
