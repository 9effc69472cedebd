"""The work of several clients done at once, before the machine turns to each of them.

The round machine is told of one update after the other, as it is in a deployment; that they were computed together is
nobody's business. What was computed for an order that is called off is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np

from fedge.errors import TaskError
from fedge.events import Send
from fedge.run import RunConfig
from fedge.seeds import work_seed
from fedge.task import Task
from fedge.vector import Array
from fedge_client.torch.trainer import Outcome
from fedge_sim.cohort import SIZES, Cohort, Member
from fedge_sim.pool import UnsuitedError
from fedge_sim.population import Population

log = logging.getLogger(__name__)

EngineName = Literal["auto", "loop", "vectorised"]
ENGINES: Final[tuple[EngineName, ...]] = ("auto", "loop", "vectorised")

_PAYS_BELOW: Final = 1 << 16
"""Parameters of a model from which on a stack is no faster than the loop, which has one model in the cache."""

_PAYS_FROM: Final = 4096
"""Turns of clients in a run that win back the second or so that it takes to trace a step."""


class Ahead:
    """Trains the clients that have the same order as a stack, a stack at a time.

    `reason` says why nothing is stacked, where nothing is; then every client is left to the loop. With `insists` the
    person who asked for stacks is told; else they are made where they pay, by a rule: a measurement would have the same
    seed give other bits on a busier machine.
    """

    def __init__(self, run: RunConfig, task: Task, population: Population, *, insists: bool = True) -> None:
        self._insists = insists
        self._run, self._population = run, population
        self._done: dict[Send, tuple[Outcome, Array]] = {}
        self._cohort: Cohort | None = None
        self._room: Array = np.empty((0, 0), np.float32)
        self.reason = ""
        try:
            if run.privacy.unit == "example":
                raise UnsuitedError("privacy of examples is the loop's")
            turns = run.rounds * run.cohort.size
            if not insists and turns < _PAYS_FROM:
                raise UnsuitedError(f"a run of {turns} turns of clients is over before a stack is faster")
            cohort = Cohort(task, seed=run.seed, usual=min(run.cohort.size, SIZES[-1]))
            if not insists and cohort.size >= _PAYS_BELOW:
                raise UnsuitedError(f"a model of {cohort.size} parameters is no faster in a stack")
            self._cohort = cohort
        except UnsuitedError as error:
            self._fall_back(error)

    def together(self, sends: Sequence[Send], model: Array) -> tuple[list[Outcome], Array] | None:
        """What the training of clients with the same order comes to, of as many as a stack holds: row i of
        float32[clients, size] is the update of the i-th, until the next call. None if the loop is to do it."""
        if self._cohort is None or sends[0].order.kind != "train" or sends[0] in self._done:
            return None
        sends = sends[: self._cohort.most]
        if self._room.shape != (len(sends), len(model)):
            self._room = np.empty((len(sends), len(model)), np.float32)
        outcomes = self._train(sends, model, self._room)
        return (outcomes, self._room) if outcomes is not None else None

    def keep(self, sends: Sequence[Send], outcomes: Sequence[Outcome], vectors: Array) -> None:
        """Have what `together` has returned taken one by one."""
        self._done = dict(zip(sends, zip(outcomes, vectors.copy(), strict=True), strict=False))

    def take(self, send: Send, model: Array, others: Mapping[Send, Array]) -> tuple[Outcome, Array] | None:
        """What a client's training for an order comes to, together with that of `others` who wait; None if the loop is
        to do it."""
        if send not in self._done and self._cohort is not None and send.order.kind == "train":
            self._done.clear()  # of orders that were called off
            waiting = [other for other, its in others.items() if other.order == send.order and its is model]
            sends = [send, *waiting][: self._cohort.most]
            out = np.empty((len(sends), len(model)), np.float32)
            outcomes = self._train(sends, model, out)
            if outcomes is not None:
                self._done = dict(zip(sends, zip(outcomes, out, strict=True), strict=True))
        return self._done.pop(send, None)

    def _train(self, sends: Sequence[Send], model: Array, out: Array) -> list[Outcome] | None:
        assert self._cohort is not None  # asked only then
        members = [Member(self._population.data(send.client)[0], self._seed(send)) for send in sends]
        try:
            return self._cohort.train(model, members, self._run.work, out)
        except UnsuitedError as error:
            self._fall_back(error)
        except TaskError:  # the loop will find out whose, when it comes to them
            pass
        return None

    def _seed(self, send: Send) -> int:
        order = send.order
        return work_seed(self._run.seed, site=send.client, kind=order.kind, round=order.round)

    def _fall_back(self, error: UnsuitedError) -> None:
        self._cohort, self.reason = None, str(error)
        level = logging.WARNING if self._insists else logging.INFO
        log.log(level, "engine_falls_back engine=vectorised to=loop reason=%s", error)
