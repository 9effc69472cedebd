"""What is done on the nodes of a Ray cluster: functions of text and arrays, in processes that stay warm.

The first order that a process gets has it import the task and divide the population; others find both there. Cohorts
of small models are stacked, as `engines.stacks` does it, if the simulation has found that they can be; others are
trained one client after the other, with one thread. Nothing depends on where it is done, or on what was done there
before, so that what a lost node has done can be done again by another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedge.errors import FedgeError
from fedge.events import OrderId, Send
from fedge.exact import ExactSum, Partial, Term
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_sim.clients import Clients
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.setting import loaded
from fedge_sim.engines.stacks import Stacks
from fedge_sim.memory import keep_freed
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts
from fedge_sim.variates import Given

Matrix = npt.NDArray[np.float32]


def train(setting: str, model: Array, order: str, own: Matrix | None = None) -> tuple[str, Matrix, Matrix]:
    """The work of some clients on `model` (float32[size]), with what they have of their own (float32[clients,
    elements], see `fedge_sim.variates`): what it came to, as JSON, their vectors, float32[clients, size],
    and what they have of their own now. `{"failed": why}` if this node cannot begin."""
    told = json.loads(order)
    sends = [
        Send(client, OrderId(told["kind"], told["round"], told["attempt"])) for client in told["clients"]
    ]
    try:
        place = _place(setting)
        place.given.rows = {}
        theirs = np.empty((0, 0), np.float32) if own is None else own.copy()  # Ray's is not to be written to
        if own is not None:
            place.given.rows = {send.client: row for send, row in zip(sends, theirs, strict=True)}
        outcomes, rows = place.work(sends, model)
    except FedgeError as error:
        nothing = np.empty((0, 0), np.float32)
        return json.dumps({"failed": str(error)}), nothing, nothing
    said = [[each.num_examples, dict(each.metrics)] if each is not None else None for each in outcomes]
    return json.dumps({"done": said}), rows, theirs


def add_up(rows: Matrix, weights: Sequence[int]) -> Partial:
    """The exact sum of the first so many vectors, weighted so."""
    total = ExactSum(rows.shape[1])
    total.add(*(Term(row, weight) for row, weight in zip(rows, weights, strict=False)))
    return total.partial()


@lru_cache(maxsize=1)
def _place(setting: str) -> _Place:
    torch.set_num_threads(1)
    keep_freed()
    told: dict[str, Any] = json.loads(setting)
    # As in the process that began the simulation, where its folders are here, too.
    sys.path += [each for each in told["path"] if each not in sys.path and Path(each).is_dir()]
    run, task = loaded(told)
    population = Population.of(run, task, count=run.simulation.clients)
    # Accounts are the simulation's, and here only say what noise there is.
    given = Given()
    clients = Clients(run, task, population, Accounts(run, told["kind"]), given)
    return _Place(clients, given, Stacks(run, task, clients, known_to_suit=True) if told["stacked"] else None)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a process keeps."""

    clients: Clients
    given: Given
    stacks: Stacks | None

    def work(self, sends: Sequence[Send], model: Array) -> tuple[Sequence[Outcome | None], Matrix]:
        kind = sends[0].order.kind
        made = np.empty((len(sends), 0 if kind == "evaluate" else len(model)), np.float32)
        outcomes: list[Outcome | None] = [None] * len(sends)
        if self.stacks is not None and kind != "evaluate":
            try:
                outcomes, rows = self.stacks.work(sends, model)
                for row, its in zip(made, rows, strict=True):
                    row[:] = its[:]
            except UnsuitedError:  # for these clients' data: the next ones' may be another matter
                outcomes = [None] * len(sends)
        for at, (send, out) in enumerate(zip(sends, made, strict=True)):
            if outcomes[at] is None:
                outcomes[at] = self.clients.attempt(send, model, out=out)
        return outcomes, made
