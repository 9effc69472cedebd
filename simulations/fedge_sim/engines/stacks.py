"""The crew of one process: as many clients as fit are trained as one stacked tensor, here or on an accelerator."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from fedge.errors import FedgeError
from fedge.events import Send
from fedge.exact import mean_of_rows
from fedge.personal import Split
from fedge.run import RunConfig
from fedge.seeds import work_seed
from fedge.strategy import WorkKind
from fedge.task import Task
from fedge.vector import Array, all_finite
from fedge_client.local import Outcome
from fedge_sim.clients import Clients
from fedge_sim.engines.accelerator import HOST
from fedge_sim.engines.cohort import Cohort, Member
from fedge_sim.engines.crew import Done, Rows, UnsuitedError
from fedge_sim.engines.elsewhere import Fetched, mean_where_it_lies
from fedge_sim.engines.judge import Judge
from fedge_sim.engines.model import SIZES, StackedModel

log = logging.getLogger(__name__)


class Stacks:
    """Trains the clients that have the same order as a stack, and has them judge together.

    On a `device` their vectors stay there: the mean is made there, and what somebody looks at is fetched. None is this
    machine's memory. `known_to_suit`: that the model and its loss can be stacked was found out elsewhere.

    Raises:
        UnsuitedError: the run or its model cannot be trained so.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        clients: Clients,
        *,
        device: torch.device | None = None,
        known_to_suit: bool = False,
    ) -> None:
        self._run, self._clients = run, clients
        usual = min(run.cohort.size, SIZES[-1])
        self._device = device
        self._model = StackedModel(
            task, seed=run.seed, usual=usual, known_to_suit=known_to_suit, device=device or HOST
        )
        self._cohort = Cohort(self._model, most_known=clients.population.most_kept)
        # What evaluations tell of private examples has noise, which is the loop's.
        self._is_private = run.privacy.unit == "example"
        self._layers = clients.layers
        # They judge one model together: who has layers of its own has another.
        shared = not self._is_private and self._layers is None
        self._judge = Judge(task, seed=run.seed, device=device or HOST) if shared else None
        self._room = torch.empty((0, 0), device=device)
        self._fetched: weakref.ref[Fetched] | None = None

    @property
    def most(self) -> int:
        return self._model.most

    def does(self, kind: WorkKind) -> bool:
        return kind != "evaluate" or self._judge is not None

    def work(self, sends: Sequence[Send], model: Array) -> Done:
        try:
            if sends[0].order.kind == "evaluate":
                return self._judged(sends, model), np.empty((len(sends), 0), np.float32)
            if self._layers is not None:
                return self._trained_apart(self._layers.split, sends, model)
            return self._trained(sends, torch.from_numpy(model).to(self._device or HOST))
        except torch.OutOfMemoryError as error:
            raise UnsuitedError(
                f"{self._device} has too little memory for {len(sends)} clients at once"
            ) from error

    def _trained_apart(self, split: Split, sends: Sequence[Send], model: Array) -> Done:
        """With personal layers: each begins with its own, and is told what they have learned."""
        host = [self._begun(split, send, model) for send in sends]
        starts = torch.from_numpy(np.stack(host)).to(self._device or HOST)
        self._make_room((len(sends), split.shared.size))
        moved = starts.new_empty(starts.shape)
        try:
            members = [self._member(send, start) for send, start in zip(sends, starts, strict=True)]
            outcomes = self._cohort.train(starts[0], members, self._run.work, moved)
        except FedgeError:  # the loop will find out whose, when it comes to them
            return [None] * len(sends), self._rows()
        for here, there in split.shared_spans:
            self._room[:, there] = moved[:, here]
        finite = moved.isfinite().all(1).tolist()
        learned = starts.add_(moved).cpu().numpy()
        for send, good, whole in zip(sends, finite, learned, strict=True):
            if good:
                self._clients.own.learned(send.client, send.order, split.personal_of(whole))
        return [each if good else None for each, good in zip(outcomes, finite, strict=True)], self._rows()

    def _begun(self, split: Split, send: Send, model: Array) -> Array:
        own = self._clients.own.of(send.client, send.order)
        assert own is not None  # everybody has some
        return split.join(model, own)

    def _make_room(self, shape: tuple[int, int]) -> None:
        last = self._fetched() if self._fetched is not None else None
        if last is not None:  # somebody still has them
            last.keep()
        if self._room.shape != shape:
            self._room = self._room.new_empty(shape)

    def _trained(self, sends: Sequence[Send], model: torch.Tensor) -> Done:
        self._make_room((len(sends), len(model)))
        work, order = self._run.work, sends[0].order
        try:
            members = [self._member(send) for send in sends]
            if order.kind == "gradient":
                outcomes = self._cohort.gradient(model, members, work, self._room, step=order.round - 1)
            else:
                outcomes = self._cohort.train(model, members, work, self._room)
        except FedgeError:  # the loop will find out whose, when it comes to them
            return [None] * len(sends), self._rows()
        finite = self._finite()
        return [each if good else None for each, good in zip(outcomes, finite, strict=True)], self._rows()

    def _member(self, send: Send, start: torch.Tensor | None = None) -> Member:
        train, order = self._clients.population.data(send.client)[0], send.order
        seed = work_seed(self._run.seed, site=send.client, kind=order.kind, round=order.round)
        private = self._clients.private(send.client, order, train) if self._is_private else None
        if start is not None:
            return Member(train, seed, private, start=start)
        found = self._clients.own.of(send.client, order)
        correction = torch.from_numpy(found).to(self._device or HOST) if found is not None else None
        return Member(train, seed, private, correction)

    def _rows(self) -> Rows:
        """The vectors of the last work."""
        if self._device is None:
            return self._room.numpy()
        rows = Fetched(self._room)
        self._fetched = weakref.ref(rows)
        return rows

    def _finite(self) -> Sequence[bool]:
        """Whether each of them is."""
        if self._device is not None:
            found: list[bool] = self._room.isfinite().all(1).tolist()
            return found
        rows: Array = self._room.numpy()
        if all_finite(rows.reshape(-1)):
            return [True] * len(rows)
        return [all_finite(row) for row in rows]

    def _judged(self, sends: Sequence[Send], model: Array) -> list[Outcome | None]:
        """What the clients make of a model, if they can judge it together: else from then on that is the loop's."""
        assert self._judge is not None  # asked only then
        try:
            return self._judge.judge(model, [self._clients.population.data(send.client)[1] for send in sends])
        except UnsuitedError as error:
            log.info("evaluations_fall_back to=loop reason=%s", error)
            self._judge = None
            return [None] * len(sends)

    def mean(self, weights: Sequence[int]) -> Array | None:
        rows = self._room[: len(weights)]
        return (
            mean_of_rows(rows.numpy(), weights) if self._device is None else mean_where_it_lies(rows, weights)
        )

    def close(self) -> None:
        pass
