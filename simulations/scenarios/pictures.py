"""What the documentation claims of simulations, as pictures: each is made of the runs of this folder that it names.

.venv/bin/python simulations/scenarios/pictures.py docs/pictures [NAME ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedge.files import write_atomic
from fedge_sim import Result, simulate
from fedge_sim.figures import Series, lines

FOLDER = Path(__file__).parent
HOUR = 3600.0

Draw = Callable[[Mapping[str, Result]], Series]


@dataclass(frozen=True)
class Picture:
    """The runs that it shows by their labels, what is drawn of them, and what its axes are called."""

    runs: Mapping[str, str]
    draw: Draw
    x: str
    y: str


def accuracy_by_round(results: Mapping[str, Result]) -> Series:
    """Where a round was judged."""
    return {label: _points(result, "accuracy", by_hour=False) for label, result in results.items()}


def accuracy_by_hour(results: Mapping[str, Result]) -> Series:
    """Of virtual time."""
    return {label: _points(result, "accuracy", by_hour=True) for label, result in results.items()}


def spread(results: Mapping[str, Result]) -> Series:
    """The accuracy at all clients, and at the tenths where it is lowest and highest."""
    (result,) = results.values()
    judged = [
        (row.round, seen.tenths["accuracy"]) for row, seen in zip(result.history, result.seen, strict=True)
    ]
    return {
        "mean of all": _points(result, "accuracy", by_hour=False),
        "lowest tenth": ([round for round, _ in judged], [low for _, (low, _) in judged]),
        "highest tenth": ([round for round, _ in judged], [high for _, (_, high) in judged]),
    }


def night(results: Mapping[str, Result]) -> Series:
    """The accuracy, and the share of clients that are there."""
    (result,) = results.values()
    hours = [moment.virtual_s / HOUR for moment in result.moments]
    return {
        "accuracy": _points(result, "accuracy", by_hour=True),
        "share of phones that charge": (
            hours,
            [moment.present / result.clients for moment in result.moments],
        ),
    }


def _points(result: Result, metric: str, *, by_hour: bool) -> tuple[list[float], list[float]]:
    judged = [row for row in result.history if metric in row.metrics]
    places = [
        result.moments[row.round - 1].virtual_s / HOUR if by_hour else float(row.round) for row in judged
    ]
    return places, [row.metrics[metric] for row in judged]


PICTURES = {
    "poisoned": Picture(
        {
            "mean, nobody lies": "poisoned-nobody",
            "mean": "poisoned-mean",
            "coordinate median": "poisoned-median",
            "trimmed mean": "poisoned-trimmed-mean",
        },
        accuracy_by_round,
        "round",
        "accuracy on images that no client has",
    ),
    "drifting": Picture(
        {
            "FedAvg": "drifting-fedavg",
            "FedProx": "drifting-fedprox",
            "SCAFFOLD": "drifting-scaffold",
        },
        accuracy_by_round,
        "round",
        "accuracy at clients of one digit each",
    ),
    "hundred-hospitals": Picture({"": "hundred-hospitals"}, spread, "round", "accuracy at the hospitals"),
    "dropouts": Picture(
        {
            "nobody drops out": "dropouts-nobody",
            "one in ten": "dropouts-tenth",
            "one in five": "dropouts-fifth",
        },
        accuracy_by_round,
        "round",
        "accuracy",
    ),
    "slow-site": Picture(
        {"waits for all twenty": "slow-site-waits", "goes on with sixteen": "slow-site-goes-on"},
        accuracy_by_hour,
        "hours of virtual time",
        "accuracy",
    ),
    "charging-phones": Picture({"": "charging-phones"}, night, "hours from six in the evening", "share"),
}


def results(name: str, *, rounds: int | None = None) -> dict[str, Result]:
    """The runs of a picture, by their labels."""
    return {
        label: simulate(FOLDER / f"{run}.toml", rounds=rounds) for label, run in PICTURES[name].runs.items()
    }


def series(name: str, *, rounds: int | None = None) -> Series:
    """What a picture shows."""
    return PICTURES[name].draw(results(name, rounds=rounds))


if __name__ == "__main__":
    for each in sys.argv[2:] or PICTURES:
        picture = PICTURES[each]
        write_atomic(Path(sys.argv[1]) / f"{each}.svg", lines(series(each), x=picture.x, y=picture.y))
