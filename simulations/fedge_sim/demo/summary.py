"""What the demo compares: each hospital alone, all of them pooled, and both federated runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from fedge.errors import RunError
from fedge.run import Work
from fedge.seeds import derive_seed
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer
from fedge_server.commands.show import human_bytes
from fedge_sim.demo import hospitals
from fedge_sim.demo.federation import Finished

SEED = 1
WITHOUT_PRIVACY = Work(epochs=30, batch_size=16, learning_rate=0.1, l2=0.01)
"""How a hospital trains for itself, and how all of them would with their cases in one place."""

_GAP = 0.06
"""By how much private training may fall behind: the noise is fresh, so each demonstration ends elsewhere."""


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
    """Train without a federation and without privacy."""
    alone = []
    for index, name in enumerate(hospitals.HOSPITALS):
        train, _ = hospitals.hospital_data(index)
        alone.append((name, len(train), _train(train)))
    return Baselines(tuple(alone), _train(hospitals.pooled()), len(hospitals.held_out()))


def print_summary(
    console: Console, compared: Baselines, outcomes: list[Outcome], *, out: Path, seconds: float
) -> None:
    """The demo's closing tables.

    Raises:
        RunError: FedAvg ended far below centralised training, or a hospital spent what was not agreed.
    """
    console.print(_accuracies(compared, outcomes))
    console.print(_budgets(compared, outcomes))
    privacy = outcomes[0].run.config.privacy
    console.print(
        f"each hospital added its own noise to every step, before anything left it: {privacy.unit}-level "
        f"differential privacy, epsilon at most {privacy.epsilon:g} a run at delta {privacy.delta:g}",
    )
    console.print("no case left its hospital; every connection was mutually authenticated TLS")
    sums = [row for outcome in outcomes for row in outcome.run.rounds if row.clients]
    fewest = min(len(row.clients) for row in sums)
    console.print(
        f"the coordinator could read {len(sums)} sums of {fewest} updates or more, and who took part; it could not "
        "read any single update",
    )
    console.print(f"models: {out}/*.safetensors   finished in {seconds:.0f} s")
    _check(compared, outcomes)


def _accuracies(compared: Baselines, outcomes: list[Outcome]) -> Table:
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
            f"federated and private, {run.config.strategy.name}",
            str(total),
            Text(f"{outcome.accuracy:.1%}", "bold"),
            human_bytes(run.bytes_up),
            human_bytes(run.bytes_down),
            f"{run.seconds_per_round * 1000:.0f} ms",
        )
    return table


def _budgets(compared: Baselines, outcomes: list[Outcome]) -> Table:
    """What each hospital's ledger says, run by run."""
    delta = outcomes[0].run.config.privacy.delta
    table = Table(title=f"epsilon that each hospital's own ledger counts, at delta {delta:g}")
    table.add_column("hospital")
    table.add_column("cases", justify="right")
    for outcome in outcomes:
        table.add_column(outcome.run.config.strategy.name, justify="right")
    for name in ("all runs", "allowed"):
        table.add_column(name, justify="right")
    for name, cases, _ in compared.alone:
        last = outcomes[-1].run.ledgers[name]
        spent = [f"{run.epsilon:.2f}" for run in last.runs]
        table.add_row(name, str(cases), *spent, Text(f"{last.total.epsilon:.2f}", "bold"), f"{last.cap:g}")
    return table


def _check(compared: Baselines, outcomes: list[Outcome]) -> None:
    gap = compared.centralised - outcomes[0].accuracy
    if gap > _GAP:
        raise RunError(
            f"expected private accuracy within {100 * _GAP:.0f} points of centralised, found {100 * gap:.1f} below"
        )
    for number, outcome in enumerate(outcomes, start=1):
        promised = outcome.run.config.privacy.epsilon or 0.0
        for name, ledger in outcome.run.ledgers.items():
            spent = [run.epsilon for run in ledger.runs]
            assert ledger.cap is not None  # client.toml has one
            if len(spent) != number or not 0 < spent[-1] <= promised or ledger.total.epsilon > ledger.cap:
                raise RunError(
                    f"{name}: expected an epsilon of at most {promised:g} for each of {number} runs, and of "
                    f"{ledger.cap:g} for all, found {spent}"
                )


def _train(data: TensorDataset) -> float:
    trainer = Trainer(hospitals.task, seed=SEED)
    model = framework.initial_model(hospitals.task, seed=SEED).vector
    delta = np.empty_like(model)
    seed = derive_seed(SEED, "centralised")
    trainer.train(model, data, WITHOUT_PRIVACY, seed=seed, out=delta)
    return trainer.evaluate(model + delta, hospitals.held_out()).metrics["accuracy"]
