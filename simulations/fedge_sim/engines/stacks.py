"""The crew of one process: as many clients as fit are trained as one stacked tensor."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from fedge.errors import TaskError
from fedge.events import Send
from fedge.exact import mean_of_rows
from fedge.run import RunConfig
from fedge.seeds import work_seed
from fedge.strategy import WorkKind
from fedge.task import Task
from fedge.vector import Array, all_finite
from fedge_client.torch.trainer import Outcome
from fedge_sim.engines.cohort import SIZES, Cohort, Member
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.judge import Judge
from fedge_sim.population import Population

log = logging.getLogger(__name__)


class Stacks:
    """Trains the clients that have the same order as a stack, and has them judge together.

    `known_to_suit`: that the model and its loss can be stacked was found out elsewhere.

    Raises:
        UnsuitedError: the run or its model cannot be trained so.
    """

    def __init__(
        self, run: RunConfig, task: Task, population: Population, *, known_to_suit: bool = False
    ) -> None:
        if run.privacy.unit == "example":
            raise UnsuitedError("privacy of examples is the loop's")
        self._run, self._population = run, population
        usual = min(run.cohort.size, SIZES[-1])
        self._cohort = Cohort(
            task, seed=run.seed, usual=usual, most_known=population.most_kept, known_to_suit=known_to_suit
        )
        self._judge: Judge | None = Judge(task, seed=run.seed)
        self._room: Array = np.empty((0, 0), np.float32)

    @property
    def most(self) -> int:
        return self._cohort.most

    def does(self, kind: WorkKind) -> bool:
        return kind != "evaluate" or self._judge is not None

    def work(self, sends: Sequence[Send], model: Array) -> tuple[list[Outcome | None], Array]:
        if sends[0].order.kind == "evaluate":
            return self._judged(sends, model), np.empty((len(sends), 0), np.float32)
        if self._room.shape != (len(sends), len(model)):
            self._room = np.empty((len(sends), len(model)), np.float32)
        members = [Member(self._population.data(send.client)[0], self._seed(send)) for send in sends]
        work, order = self._run.work, sends[0].order
        try:
            if order.kind == "gradient":
                outcomes = self._cohort.gradient(model, members, work, self._room, step=order.round - 1)
            else:
                outcomes = self._cohort.train(model, members, work, self._room)
        except TaskError:  # the loop will find out whose, when it comes to them
            return [None] * len(sends), self._room
        if all_finite(self._room.reshape(-1)):
            return [*outcomes], self._room
        finite = [all_finite(row) for row in self._room]
        return [each if good else None for each, good in zip(outcomes, finite, strict=True)], self._room

    def _judged(self, sends: Sequence[Send], model: Array) -> list[Outcome | None]:
        """What the clients make of a model, if they can judge it together: else from then on that is the loop's."""
        assert self._judge is not None  # asked only then
        try:
            return self._judge.judge(model, [self._population.data(send.client)[1] for send in sends])
        except UnsuitedError as error:
            log.info("evaluations_fall_back to=loop reason=%s", error)
            self._judge = None
            return [None] * len(sends)

    def mean(self, weights: Sequence[int]) -> Array | None:
        return mean_of_rows(self._room[: len(weights)], weights)

    def close(self) -> None:
        pass

    def _seed(self, send: Send) -> int:
        order = send.order
        return work_seed(self._run.seed, site=send.client, kind=order.kind, round=order.round)
