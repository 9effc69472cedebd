"""The clients of a cohort as the rows of one tensor, from the model that they begin with to what each has learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fedge.optimizer import Optimizer
from fedge.run import Work
from fedge_client.torch.optim import InPlaceOptimizer
from fedge_client.torch.trainer import Outcome
from fedge_sim.engines.pool import Part, Shelf, all_alike, filler, gathered

Arguments = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]
"""Of all clients: parameters, inputs, targets, weights."""

Slopes = tuple[list[torch.Tensor], torch.Tensor]
"""Of all clients: gradients, and losses float32[clients]."""


class Model(Protocol):
    """What is trained: a step of it for many clients, and how they lie in memory."""

    @property
    def shelf(self) -> Shelf:
        """Where they lie, and what is there already."""
        ...

    def step(self, arguments: Arguments) -> Slopes: ...

    def views(self, stack: torch.Tensor) -> list[torch.Tensor]: ...

    def room(self, members: int) -> torch.Tensor: ...

    def size_for(self, members: int) -> int: ...


def train_stack(
    model: Model, start: torch.Tensor, parts: Sequence[Part], work: Work, out: torch.Tensor
) -> list[Outcome]:
    """Train members, those with the most steps first, from `start` (float32[size]); row i of `out` (float32[members,
    size]) is what member i has moved by. Both are where the model lies.

    Raises:
        UnsuitedError: it cannot be done for all at once.
        TaskError: a member's data cannot be read.
    """
    return _outcomes([part.batches.size for part in parts], trained(model, start, parts, work, out))


def trained(
    model: Model, start: torch.Tensor, parts: Sequence[Part], work: Work, out: torch.Tensor
) -> torch.Tensor:
    """As `train_stack`: the mean losses, float64[members], where the model lies; nothing waits for it."""
    return _Stack(model, start, parts, work).run(out)


def gradient_stack(
    model: Model, start: torch.Tensor, parts: Sequence[Part], step: int, work: Work, out: torch.Tensor
) -> list[Outcome]:
    """The gradients of members at `start` (float32[size]) on their batches of this step: row i of `out`
    (float32[members, size]) is that of member i, with the regulariser's.

    Raises:
        UnsuitedError, TaskError: as `train_stack`.
    """
    count = model.size_for(len(parts))
    theta = model.room(count)
    theta.copy_(start)
    filled = gathered(parts, count, model.shelf).fill(step, count)
    with torch.no_grad():
        slopes, losses = model.step((model.views(theta), filled.inputs, filled.targets, filled.weights))
        for slope, room in zip(slopes, model.views(out), strict=True):
            room.copy_(slope[: len(parts)])
        if work.l1 or work.l2:
            flat, at = out.view(-1), theta[: len(parts)].view(-1)
            optimizer = InPlaceOptimizer(flat.numel(), flat.device)
            optimizer.regularise(flat, at, l1=work.l1, l2=work.l2)
    sizes = filled.weights.sum(1).tolist()
    return _outcomes([int(size) for size in sizes[: len(parts)]], losses[: len(parts)].double())


def _outcomes(sizes: Sequence[int], losses: torch.Tensor) -> list[Outcome]:
    """Of members with so many examples, and losses float64[members]."""
    return [Outcome(size, {"train_loss": loss}) for size, loss in zip(sizes, losses.tolist(), strict=True)]


class _Stack:
    def __init__(self, model: Model, start: torch.Tensor, parts: Sequence[Part], work: Work) -> None:
        self._model, self._parts, self._work = model, parts, work
        count = model.size_for(len(parts))
        self._start = start
        self._theta = model.room(count)
        self._theta.copy_(start)
        self._views: dict[int, list[torch.Tensor]] = {}
        self._filler = filler(parts, count, model.shelf)
        self._counted = _counted(parts, work).to(start.device)

    def run(self, out: torch.Tensor) -> torch.Tensor:
        move = self._simply if _is_simple(self._work) else self._mover()
        losses = torch.zeros(len(self._parts), dtype=torch.float64, device=out.device)
        active = len(self._parts)
        for step in range(self._parts[0].steps):
            while self._parts[active - 1].steps == step:  # it has made all of its own
                active -= 1
            clients = self._model.size_for(active)
            views = self._views_of(min(clients, len(self._theta)))
            filled = self._filler.fill(step, len(views[0]))
            with torch.no_grad():
                slopes, loss = self._model.step((views, filled.inputs, filled.targets, filled.weights))
                move(views, slopes)
            losses[:active] += loss[:active].double() * self._counted[:active, step]
            ended = next((at for at in range(active) if self._parts[at].steps == step + 1), active)
            torch.sub(self._theta[ended:active], self._start, out=out[ended:active])
        return losses / self._counted.sum(1)

    def _views_of(self, clients: int) -> list[torch.Tensor]:
        if clients not in self._views:
            self._views[clients] = self._model.views(self._theta[:clients])
        return self._views[clients]

    def _simply(self, views: list[torch.Tensor], slopes: list[torch.Tensor]) -> None:
        """A step of plain SGD. Who has made all steps moves on, too, and nobody looks."""
        for view, slope in zip(views, slopes, strict=True):
            view.add_(slope, alpha=-self._work.learning_rate)

    def _mover(self) -> Callable[[list[torch.Tensor], list[torch.Tensor]], None]:
        """Steps of any optimiser, with a regulariser or without."""
        work, theta = self._work, self._theta.view(-1)
        whole = torch.zeros_like(self._theta)
        rooms, gradient = self._model.views(whole), whole.view(-1)
        optimizer = InPlaceOptimizer(theta.numel(), theta.device)
        optimizer.begin(_optimizer_of(work))

        def move(views: list[torch.Tensor], slopes: list[torch.Tensor]) -> None:
            for slope, room in zip(slopes, rooms, strict=True):
                room[: len(slope)] = slope
            if work.l1 or work.l2:
                optimizer.regularise(gradient, theta, l1=work.l1, l2=work.l2)
            optimizer.step(theta, gradient)

        return move


def _counted(parts: Sequence[Part], work: Work) -> torch.Tensor:
    """What a step's mean loss weighs in a member's: its examples, in the last epoch, or in all of so many steps;
    float64[members, steps]."""
    if all_alike(parts) and len(parts) > 1:
        return _counted(parts[:1], work).expand(len(parts), -1)
    steps = torch.arange(parts[0].steps)
    own = torch.tensor([part.steps for part in parts])[:, None]
    per_epoch = torch.tensor([part.batches.per_epoch for part in parts])[:, None]
    size = torch.tensor([part.batches.batch_size for part in parts])[:, None]
    last = torch.tensor([part.batches.size for part in parts])[:, None] - (per_epoch - 1) * size
    sizes = torch.where((steps + 1) % per_epoch == 0, last, size)
    wanted = (steps < own) & (steps >= (0 if work.steps else own - per_epoch))
    return (sizes * wanted).double()


def _is_simple(work: Work) -> bool:
    return work.optimizer == "sgd" and not work.l1 and not work.l2


def _optimizer_of(work: Work) -> Optimizer:
    return Optimizer(work.optimizer, work.learning_rate, work.momentum, work.beta1, work.beta2, work.epsilon)
