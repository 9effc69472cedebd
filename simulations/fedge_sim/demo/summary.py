"""What the demo compares: each hospital alone, all of them pooled, and both federated runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from fedge.config import parse_toml
from fedge.errors import RunError
from fedge.run import RunConfig
from fedge.seeds import derive_seed
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer
from fedge_server.commands.show import human_bytes
from fedge_sim.demo import hospitals
from fedge_sim.demo.federation import RUNS, Finished


@dataclass(frozen=True, slots=True)
class Outcome:
    """A federated run and the accuracy of its model on the held-out cases."""

    run: Finished
    accuracy: float


@dataclass(frozen=True, slots=True)
class Baselines:
    """Accuracy on the held-out cases: of each hospital by itself, and of all data in one place."""

    alone: tuple[tuple[str, int, float], ...]
    centralised: float
    held_out: int


def federated_accuracy(path: Path) -> float:
    """The held-out accuracy of an exported model, loaded the way its users will: by `load_state_dict`."""
    module = hospitals.model()
    module.load_state_dict(load_file(path))
    module.eval()
    inputs, labels = hospitals.held_out().tensors
    with torch.inference_mode():
        return float(hospitals.accuracy(module(inputs), labels))


def baselines() -> Baselines:
    """Train without a federation, as long and with the same settings as its FedAvg run."""
    config = parse_toml((RUNS / "fedavg.toml").read_text(encoding="utf-8"), RunConfig, source="fedavg.toml")
    alone = []
    for index, name in enumerate(hospitals.HOSPITALS):
        train, _ = hospitals.hospital_data(index)
        alone.append((name, len(train), _train(config, train)))
    return Baselines(tuple(alone), _train(config, hospitals.pooled()), len(hospitals.held_out()))


def print_summary(
    console: Console, compared: Baselines, outcomes: list[Outcome], *, out: Path, seconds: float
) -> None:
    """The demo's closing table.

    Raises:
        RunError: FedAvg ended more than a point below (or above) centralised training.
    """
    table = Table(title=f"accuracy on {compared.held_out} held-out cases")
    for name in ("trained", "cases", "accuracy", "up", "down", "a round"):
        table.add_column(name, justify="left" if name == "trained" else "right")
    for name, cases, accuracy in compared.alone:
        table.add_row(f"{name} alone", str(cases), f"{accuracy:.1%}", "", "", "")
    total = sum(cases for _, cases, _ in compared.alone)
    table.add_section()
    table.add_row("centralised", str(total), f"{compared.centralised:.1%}", "all data", "", "")
    for outcome in outcomes:
        run = outcome.run
        table.add_row(
            f"federated, {run.config.strategy.name}",
            str(total),
            f"[bold]{outcome.accuracy:.1%}[/]",
            human_bytes(run.bytes_up),
            human_bytes(run.bytes_down),
            f"{run.seconds_per_round * 1000:.0f} ms",
        )
    console.print(table)
    console.print(
        "no case left its hospital; every connection was mutually authenticated TLS", highlight=False
    )
    console.print("this version does not yet hide single updates from the coordinator", highlight=False)
    console.print(f"models: {out}/*.safetensors   finished in {seconds:.0f} s", highlight=False)
    gap = abs(outcomes[0].accuracy - compared.centralised)
    if gap > 0.01:
        raise RunError(
            f"expected federated accuracy within one point of centralised, found {100 * gap:.1f} points"
        )


def _train(config: RunConfig, data: TensorDataset) -> float:
    trainer = Trainer(hospitals.task, seed=config.seed)
    model = framework.initial_model(hospitals.task, seed=config.seed).vector
    delta = np.empty_like(model)
    epochs = (config.work.epochs or 1) * config.rounds
    work = config.work.model_copy(update={"epochs": epochs})
    trainer.train(model, data, work, seed=derive_seed(config.seed, "centralised"), out=delta)
    return trainer.evaluate(model + delta, hospitals.held_out()).metrics["accuracy"]
