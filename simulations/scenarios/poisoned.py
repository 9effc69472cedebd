"""A quarter of the clients send the opposite of what they learned: what the ways to aggregate make of it, as a picture.

.venv/bin/python simulations/scenarios/poisoned.py docs/pictures/poisoned.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedge.files import write_atomic
from fedge_sim import simulate
from fedge_sim.figures import Series, lines

FOLDER = Path(__file__).parent
LABELS = {
    "poisoned-nobody": "mean, nobody lies",
    "poisoned-mean": "mean",
    "poisoned-median": "coordinate median",
    "poisoned-trimmed-mean": "trimmed mean",
}


def accuracies(*, rounds: int | None = None) -> Series:
    """By run: its rounds, and the accuracy on images that no client has."""
    found = {}
    for name, label in LABELS.items():
        history = simulate(FOLDER / f"{name}.toml", rounds=rounds).history
        found[label] = [row.round for row in history], [row.metrics["accuracy"] for row in history]
    return found


if __name__ == "__main__":
    write_atomic(Path(sys.argv[1]), lines(accuracies(), x="round", y="accuracy on images that no client has"))
