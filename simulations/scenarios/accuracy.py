"""How accurate private runs are: every scenario of this folder, over a few seeds, as the table that the docs show.

.venv/bin/python simulations/scenarios/accuracy.py [SEEDS]
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedge.run import RunConfig
from fedge.task import load_task
from fedge_client.torch.flat import FlatModule
from fedge_sim import simulate

FOLDER = Path(__file__).parent
HEAD = (
    "| scenario | clients | unit | epsilon asked | stated | delta | accuracy |\n"
    "|---|---:|---|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Reached:
    """A run's model on cases that no client has, and the largest epsilon of a client."""

    accuracy: float
    epsilon: float | None


def reach(path: Path, *, seed: int) -> Reached:
    """Simulate a scenario, and judge its model."""
    run = RunConfig.load(path)
    load_task(run.task, path=path.parent)
    module: Any = importlib.import_module(run.task.partition(":")[0])
    result = simulate(path, seed=seed)
    model = FlatModule(module.model())
    model.load(result.model.vector)
    inputs, labels = module.held_out().tensors
    with torch.inference_mode():
        accuracy = float(module.accuracy(model.module(inputs), labels))
    return Reached(accuracy, result.privacy.epsilon)


def rows(seeds: int) -> Iterator[str]:
    """The table, a line at a time."""
    yield HEAD
    for path in scenarios():
        found = [reach(path, seed=seed) for seed in range(seeds)]
        yield row(RunConfig.load(path), found)


def scenarios() -> list[Path]:
    """Those about privacy."""
    found = (path for name in ("breast-cancer*.toml", "digits*.toml") for path in FOLDER.glob(name))
    return sorted(found, key=lambda path: path.stem)


def row(run: RunConfig, found: list[Reached]) -> str:
    privacy = run.privacy
    accuracies = [each.accuracy for each in found]
    mean, spread = statistics.mean(accuracies), statistics.pstdev(accuracies)
    promise = ["none", "", "", ""]
    if privacy.unit != "none":
        stated = max(each.epsilon or 0.0 for each in found)
        promise = [privacy.unit, f"{privacy.epsilon:g}", f"{stated:.2f}", f"{privacy.delta:g}"]
    cells = [f"`{run.name}`", str(run.simulation.clients), *promise, f"{mean:.1%} ± {spread:.1%}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        print(line, flush=True)
