"""The clients of a cohort as the rows of one tensor, from the model that they begin with to what each has learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fedge.optimizer import Optimizer
from fedge.run import Work
from fedge_client.local import Outcome
from fedge_client.torch.optim import InPlaceOptimizer
from fedge_sim.engines.model import Slopes, StackedModel
from fedge_sim.engines.noisy import Noisy, all_private, private_outcomes
from fedge_sim.engines.pool import Filler, Part, all_alike, filler, gathered


def train_stack(
    model: StackedModel, start: torch.Tensor, work: Work, parts: Sequence[Part], out: torch.Tensor
) -> list[Outcome]:
    """Train members, those with the most steps first, from `start` (float32[size]); row i of `out` (float32[members,
    size]) is what member i has moved by. Both are where the model lies.

    Raises:
        UnsuitedError: it cannot be done for all at once.
        TaskError: a member's data cannot be read.
    """
    if all_private(parts):
        trained(model, start, work, parts, out, Noisy(model, work, parts, "train"))
        return private_outcomes(parts, work, "train")
    batches = OfBatches(model, filler(parts, model.size_for(len(parts)), model.shelf))
    losses = trained(model, start, work, parts, out, batches)
    return _outcomes([part.batches.size for part in parts], losses)


def trained(
    model: StackedModel,
    start: torch.Tensor,
    work: Work,
    parts: Sequence[Part],
    out: torch.Tensor,
    gradients: Gradients,
) -> torch.Tensor:
    """As `train_stack`: the mean losses, float64[members], where the model lies; nothing waits for it."""
    return _Stack(model, start, work, parts).run(gradients, out)


def gradient_stack(
    model: StackedModel, start: torch.Tensor, work: Work, parts: Sequence[Part], out: torch.Tensor
) -> list[Outcome]:
    """The gradients of members at `start` (float32[size]) on their batches of the last of their steps, of which all
    make as many: row i of `out` (float32[members, size]) is that of member i, with the regulariser's.

    Raises:
        UnsuitedError, TaskError: as `train_stack`.
    """
    step, count = parts[0].steps - 1, model.size_for(len(parts))
    gradients: Gradients
    if all_private(parts):
        gradients = Noisy(model, work, parts, "gradient")
    else:
        gradients = OfBatches(model, gathered(parts, count, model.shelf))
    theta = model.room(count)
    theta.copy_(start)
    with torch.no_grad():
        slopes, losses = gradients.at(step, model.views(theta), len(parts))
        for slope, room in zip(slopes, model.views(out), strict=True):
            room.copy_(slope[: len(parts)])
        if work.regularises:
            optimizer = InPlaceOptimizer(out.numel(), out.device)
            optimizer.regularise(out, theta[: len(parts)], start, work)
    if all_private(parts):
        return private_outcomes(parts, work, "gradient")
    return _outcomes([part.size_at(step) for part in parts], losses[: len(parts)].double())


def _outcomes(sizes: Sequence[int], losses: torch.Tensor) -> list[Outcome]:
    """Of members with so many examples, and losses float64[members]."""
    return [Outcome(size, {"train_loss": loss}) for size, loss in zip(sizes, losses.tolist(), strict=True)]


class Gradients(Protocol):
    """Where the gradients of a stack's steps come from."""

    def at(self, step: int, parameters: list[torch.Tensor], active: int) -> Slopes:
        """Those of the first `active` members, at parameters of as many or more: what else there is means nothing.

        Raises:
            UnsuitedError, TaskError: as `train_stack`.
        """
        ...


class OfBatches:
    """Mean gradients of batches."""

    def __init__(self, model: StackedModel, batches: Filler) -> None:
        self._model, self._batches = model, batches

    def at(self, step: int, parameters: list[torch.Tensor], active: int) -> Slopes:
        return self._model.step(parameters, self._batches.fill(step, len(parameters[0])))


class _Stack:
    def __init__(self, model: StackedModel, start: torch.Tensor, work: Work, parts: Sequence[Part]) -> None:
        self._model, self._parts, self._work = model, parts, work
        self._theta = model.room(model.size_for(len(parts)))
        self._theta.copy_(start)
        self._start = start
        own = [part.start for part in parts if part.start is not None]
        if own:
            assert len(own) == len(parts)  # they have the same order
            torch.stack(own, out=self._theta[: len(own)])
            self._start = self._theta.clone()
        self._views: dict[int, list[torch.Tensor]] = {}
        self._counted = _counted(parts, work).to(start.device)
        self._corrections = _corrections(parts, self._theta)

    def run(self, gradients: Gradients, out: torch.Tensor) -> torch.Tensor:
        simple = _is_simple(self._work) and self._corrections is None
        move = self._simply if simple else self._mover()
        losses = torch.zeros(len(self._parts), dtype=torch.float64, device=out.device)
        active = len(self._parts)
        for step in range(self._parts[0].steps):
            while self._parts[active - 1].steps == step:  # it has made all of its own
                active -= 1
            clients = self._model.size_for(active)
            views = self._views_of(min(clients, len(self._theta)))
            with torch.no_grad():
                slopes, loss = gradients.at(step, views, active)
                move(views, slopes)
            losses[:active] += loss[:active].double() * self._counted[:active, step]
            ended = next((at for at in range(active) if self._parts[at].steps == step + 1), active)
            start = self._start[ended:active] if self._start.ndim > 1 else self._start
            torch.sub(self._theta[ended:active], start, out=out[ended:active])
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
        """Steps of any optimiser, with a regulariser and corrections or without."""
        work, theta = self._work, self._theta.view(-1)
        whole = torch.zeros_like(self._theta)
        rooms, gradient = self._model.views(whole), whole.view(-1)
        optimizer = InPlaceOptimizer(theta.numel(), theta.device)
        optimizer.begin(_optimizer_of(work))

        def move(views: list[torch.Tensor], slopes: list[torch.Tensor]) -> None:
            for slope, room in zip(slopes, rooms, strict=True):
                room[: len(slope)] = slope
            if work.regularises:
                optimizer.regularise(whole, self._theta, self._start, work)
            if self._corrections is not None:
                whole.add_(self._corrections)
            optimizer.step(theta, gradient)

        return move


def _corrections(parts: Sequence[Part], like: torch.Tensor) -> torch.Tensor | None:
    """What corrects the gradients of members, all of whom have something that does, or none; behind them zeros."""
    rows = [part.correction for part in parts if part.correction is not None]
    if not rows:
        return None
    assert len(rows) == len(parts)  # they have the same order
    found = torch.zeros_like(like)
    torch.stack(rows, out=found[: len(rows)])
    return found


def _counted(parts: Sequence[Part], work: Work) -> torch.Tensor:
    """What a step's mean loss weighs in a member's: its examples, in the last epoch, or in all of so many steps;
    float64[members, steps]."""
    if all_alike(parts):
        first = parts[0]
        begun = 0 if work.steps else first.steps - first.batches.per_epoch
        counted = [first.size_at(step) * (step >= begun) for step in range(first.steps)]
        return torch.tensor([counted], dtype=torch.float64).expand(len(parts), -1)
    steps = torch.arange(parts[0].steps)
    own = torch.tensor([part.steps for part in parts])[:, None]
    per_epoch = torch.tensor([part.batches.per_epoch for part in parts])[:, None]
    size = torch.tensor([part.batches.batch_size for part in parts])[:, None]
    last = torch.tensor([part.batches.size for part in parts])[:, None] - (per_epoch - 1) * size
    sizes = torch.where((steps + 1) % per_epoch == 0, last, size)
    wanted = (steps < own) & (steps >= (0 if work.steps else own - per_epoch))
    return (sizes * wanted).double()


def _is_simple(work: Work) -> bool:
    return work.optimizer == "sgd" and not work.regularises


def _optimizer_of(work: Work) -> Optimizer:
    return Optimizer(work.optimizer, work.learning_rate, work.momentum, work.beta1, work.beta2, work.epsilon)
