"""A coordinator that dies and starts again from what a deployed one keeps; the same functions read and write it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedge import federation
from fedge.errors import RunError
from fedge.events import OrderId
from fedge.learning import Learning
from fedge.pipeline import Update
from fedge.run_state import Federation, Returned, RunEffect, still_open
from fedge.simulation import FaultsConfig
from fedge.snapshot import revive, take
from fedge.strategy import WorkKind
from fedge.vector import Model
from fedge_server.store.machine import decode_machine, encode_machine

MOST_CRASHES: Final = 1000
"""Of the coordinator in one round: a crash ends an attempt at a secure sum, so that some would never end."""

Kept = Mapping[WorkKind, list[tuple[OrderId, Update]]]
"""Accepted updates of open orders."""


@dataclass(frozen=True, eq=False)
class Restarted:
    """What there is again, and what is to be done."""

    machine: Federation
    learning: Learning
    kept: dict[WorkKind, list[tuple[OrderId, Update]]]
    effects: tuple[RunEffect, ...]


def check_stuck(crashes: int, round: int, faults: FaultsConfig) -> None:
    """
    Raises:
        RunError: the coordinator has crashed too often in a round for it ever to be completed.
    """
    if crashes > MOST_CRASHES:
        raise RunError(
            f"the coordinator crashed {MOST_CRASHES} times in round {round}, at every {faults.crash_every} events, "
            "between which it cannot be completed: choose a larger simulation.faults.crash_every"
        )


def restarted(machine: Federation, learning: Learning, kept: Kept, *, gone: Collection[str]) -> Restarted:
    """The coordinator after it has died and started again, and all clients have come back but those who are `gone`."""
    blank = Model(np.zeros(learning.layout.size, np.float32), learning.layout)
    begun = Learning.begin(learning.strategy, blank, learning.central)
    revived = begun.revived(revive(take(learning.kept), begun.kept))
    names: dict[OrderId, list[str]] = {}
    for order, update in (each for updates in kept.values() for each in updates):
        names.setdefault(order, []).append(update.client)
    machine, effects = federation.resume(decode_machine(encode_machine(machine)), names)
    wanted = still_open(machine, effects)
    counting = {kind: [each for each in updates if each[0] in wanted] for kind, updates in kept.items()}
    for order, update in (each for updates in counting.values() for each in updates):
        if revived.streams(order):
            revived = revived.fold(order, update)
    for client in sorted(machine.clients.difference(gone)):
        machine, more = federation.step(machine, Returned(client))
        effects += more
    return Restarted(machine, revived, counting, effects)
