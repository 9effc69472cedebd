"""Many clients at once: the members of a cohort, from their training sets to the rows of a stack.

Equal to the loop to float32's rounding. What cannot be done so (`UnsuitedError`) is left to the loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fedge.run import Work
from fedge_client.local import Outcome
from fedge_client.torch.batches import Batches, Order
from fedge_client.torch.private.steps import Private
from fedge_sim.engines.model import SIZES, StackedModel
from fedge_sim.engines.noisy import most_at_once
from fedge_sim.engines.pool import Part
from fedge_sim.engines.stack import gradient_stack, train_stack

_Done = Callable[[Sequence[Part], torch.Tensor], list[Outcome]]


@dataclass(frozen=True, eq=False)
class Member:
    """One client's part: its training set, the seed of its work, what it does for the privacy of its examples, what
    corrects its gradients (`fedge.variates`), where the model lies, and the model that it begins with, float32[size],
    if members have one each."""

    train: Any
    seed: int
    private: Private | None = None
    correction: torch.Tensor | None = None
    start: torch.Tensor | None = None


class Cohort:
    """Trains cohorts of a model; the batches of `most_known` training sets are kept.

    Members do their work for the privacy of their examples all, or none does.
    """

    def __init__(self, model: StackedModel, *, most_known: int = SIZES[-1]) -> None:
        self._model = model
        self._most_known = most_known
        self._order = Order()
        self._known: OrderedDict[int, tuple[Any, Any, Batches]] = OrderedDict()

    def train(
        self, start: torch.Tensor, members: Sequence[Member], work: Work, out: torch.Tensor
    ) -> list[Outcome]:
        """Train every member from `start` (float32[size]); row i of `out` (float32[members, size]) is what member i has
        moved by; both lie where the model does. As `Trainer.train`.

        Raises:
            UnsuitedError: the model or the loss cannot be done for all at once.
            TaskError: a member's data cannot be read.
        """
        batches = [self._batches_of(member.train, work) for member in members]
        parts = [
            Part(
                each,
                member.seed,
                work.steps or (work.epochs or 1) * each.per_epoch,
                member.private,
                member.correction,
                member.start,
            )
            for each, member in zip(batches, members, strict=True)
        ]
        return self._in_stacks(partial(train_stack, self._model, start, work), parts, work, out)

    def gradient(
        self, start: torch.Tensor, members: Sequence[Member], work: Work, out: torch.Tensor, *, step: int
    ) -> list[Outcome]:
        """Every member's gradient at `start` (float32[size]) on its batch of `step`, to the rows of `out`. As
        `Trainer.gradient`.

        Raises:
            UnsuitedError, TaskError: as `train`.
        """
        parts = [
            Part(self._batches_of(each.train, work), each.seed, step + 1, each.private) for each in members
        ]
        return self._in_stacks(partial(gradient_stack, self._model, start, work), parts, work, out)

    def _in_stacks(self, do: _Done, parts: Sequence[Part], work: Work, out: torch.Tensor) -> list[Outcome]:
        """As many at once as there is room for, those with the most steps first: at each step those who are still at it
        are then the first so many."""
        most = most_at_once(self._model, parts, work)
        order = sorted(range(len(parts)), key=lambda at: -parts[at].steps)
        if order == list(range(len(parts))) and len(parts) <= most:
            return do(parts, out)
        outcomes: dict[int, Outcome] = {}
        for start in range(0, len(order), most):
            some = order[start : start + most]
            moved = out.new_empty((len(some), self._model.size))
            outcomes |= zip(some, do([parts[at] for at in some], moved), strict=True)
            out[some] = moved
        return [outcomes[at] for at in range(len(parts))]

    def _batches_of(self, train: Any, work: Work) -> Batches:
        """Those of a training set, made once: a population gives the same one again."""
        known = self._known.get(id(train))
        if known is not None and known[0] is train and known[1] == work.batch_size:
            self._known.move_to_end(id(train))
            return known[2]
        batches = Batches(train, work.batch_size, order=self._order)
        self._known[id(train)] = train, work.batch_size, batches
        self._known.move_to_end(id(train))
        if len(self._known) > self._most_known:
            self._known.popitem(last=False)
        return batches
