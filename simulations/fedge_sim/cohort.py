"""Many clients at once: their models are the rows of one tensor, and a step of all of them is a few batched products.

The step is traced once from the task's own model and loss, by torch.func, for a number of clients and a size of batch;
what comes of it is a list of torch's own operations, without Python of the model or of torch.func between them.
Smaller batches are padded with examples that weigh nothing, smaller cohorts with clients that nobody asked.

Equal to the loop to float32's rounding. What cannot be done so (`UnsuitedError`) is left to the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fedge.optimizer import Optimizer
from fedge.run import Work
from fedge.task import Task
from fedge.vector import Array
from fedge_client.torch.batches import Batches, Order
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module
from fedge_client.torch.optim import InPlaceOptimizer
from fedge_client.torch.trainer import Outcome
from fedge_sim.pool import UnsuitedError, filler

SIZES = (4, 8, 16, 32, 64, 128, 256)
"""Clients in a stack: the smallest of these that holds a cohort is traced."""

MAX_STACK_BYTES = 1 << 28
"""Of the clients' vectors, once: gradients and optimisers take as much again, two to four times."""

_MOST_KNOWN = 4096
"""Training sets whose batches are kept."""

_CLOSE = 1e-3
"""What a mean over rows may differ by from the task's own loss, relative to it, and still be it."""


@dataclass(frozen=True, eq=False)
class Member:
    """One client's part: its training set, and the seed of its work."""

    train: Any
    seed: int


Step = Callable[..., tuple[list[torch.Tensor], torch.Tensor]]
"""(parameters, inputs, targets, weights) of all clients -> their gradients, and their losses float32[clients]."""


class Cohort:
    """Trains cohorts of a task's model, of which the most have `usual` members.

    Raises:
        UnsuitedError: the model holds more than float32 parameters: buffers, frozen or tied ones.
    """

    def __init__(self, task: Task, *, seed: int, usual: int = SIZES[-1]) -> None:
        self._task = task
        self._sizes = sorted({*SIZES, usual})
        self._flat = FlatModule(build_module(task, seed=seed))
        self._flat.module.train()
        layout = self._flat.layout
        odd = [each.name for each in layout.tensors if each.role != "trainable" or each.tied]
        odd += [each.name for each in layout.tensors if each.dtype != "float32"]
        if odd or layout.carried or any(True for _ in self._flat.module.buffers()):
            raise UnsuitedError(
                f"its model has more than parameters of its own: {', '.join(odd) or 'buffers'}"
            )
        self._names = [each.name for each in layout.tensors]
        self._shapes = [each.shape for each in layout.tensors]
        self._slices = layout.slices
        self.size = layout.size
        self._order = Order()
        self._room = torch.empty(0)
        self._known: dict[int, tuple[Any, Any, Batches]] = {}
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._tried = False

    @property
    def most(self) -> int:
        """Clients in a stack."""
        return max(1, min(self._sizes[-1], MAX_STACK_BYTES // (4 * self.size)))

    def train(self, model: Array, members: Sequence[Member], work: Work, out: Array) -> list[Outcome]:
        """Train every member from `model` (float32[size]); row i of `out` (float32[members, size]) is what member i has
        moved by. As `Trainer.train`.

        Raises:
            UnsuitedError: the model or the loss cannot be done for all at once.
            TaskError: a member's data cannot be read.
        """
        batches = [self._batches_of(member.train, work) for member in members]
        steps = [work.steps or (work.epochs or 1) * each.per_epoch for each in batches]
        outcomes: dict[int, Outcome] = {}
        # Members of one length at a time, the same whoever else is asked.
        for length in sorted(set(steps)):
            group = [at for at, count in enumerate(steps) if count == length]
            for start in range(0, len(group), self.most):
                part = group[start : start + self.most]
                moved = _Stack(
                    self, model, [batches[at] for at in part], [members[at].seed for at in part], work
                )
                outcomes |= zip(part, moved.run(length, out, part), strict=True)
        return [outcomes[at] for at in range(len(members))]

    def _batches_of(self, train: Any, work: Work) -> Batches:
        """Those of a training set, made once: a population gives the same one again."""
        known = self._known.get(id(train))
        if known is not None and known[0] is train and known[1] == work.batch_size:
            return known[2]
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        batches = Batches(train, work.batch_size, order=self._order)
        self._known[id(train)] = train, work.batch_size, batches
        return batches

    def room(self, members: int) -> torch.Tensor:
        """Memory for the vectors of a stack: the same for each stack of a size."""
        if self._room.shape != (members, self.size):
            self._room = torch.empty(members, self.size)
        return self._room

    def size_for(self, members: int) -> int:
        """Of the stack for so many."""
        return next((size for size in self._sizes if size >= members), members)

    def views(self, stack: torch.Tensor) -> list[torch.Tensor]:
        """The parameters of a stack of vectors, each [clients, *shape]."""
        return [
            stack[:, where].view(len(stack), *shape)
            for where, shape in zip(self._slices, self._shapes, strict=True)
        ]

    def step(self, arguments: tuple[Any, ...]) -> Step:
        """The traced step for arguments of these shapes.

        Raises:
            UnsuitedError: torch.func cannot do it, or it is not what the task's own loss says.
        """
        parameters, inputs, targets, _ = arguments
        key = (inputs.shape, inputs.dtype, targets.shape, targets.dtype)
        if key not in self._steps:
            try:
                if not self._tried:
                    self._try(parameters, inputs, targets)
                    self._tried = True
                self._steps[key] = self._traced(*arguments)
            except UnsuitedError:
                raise
            except Exception as error:  # user code under torch.func may raise anything
                raise UnsuitedError(
                    f"torch.func cannot do it: {type(error).__name__}: {error}"[:300]
                ) from error
        return self._steps[key]

    def _traced(self, *arguments: Any) -> Step:
        def loss(parameters: Any, inputs: Any, targets: Any, weights: Any) -> torch.Tensor:  # no bound method
            return self._loss_of_one(parameters, inputs, targets, weights)

        traced: Step = make_fx(vmap(grad_and_value(loss)))(*arguments)
        return traced

    def _loss_of_one(
        self, parameters: list[torch.Tensor], inputs: Any, targets: Any, weights: torch.Tensor
    ) -> torch.Tensor:
        output = self._output(parameters, inputs)
        return (self._rows(output, targets) * weights).sum() / weights.sum()

    def _output(self, parameters: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self._names, parameters, strict=True))
        found: torch.Tensor = functional_call(self._flat.module, named, (inputs,))
        return found

    def _rows(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = vmap(lambda one, wanted: self._task.loss(one[None], wanted[None]))(
            output, targets
        )
        return rows

    def _try(self, parameters: list[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Whether the model draws no random numbers, keeps rows apart, and has a loss that is a mean over rows."""
        one = [parameter[0] for parameter in parameters]
        before = torch.get_rng_state()
        with torch.no_grad():
            output = self._output(one, inputs[0])
            whole = self._task.loss(output, targets[0])
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise UnsuitedError("its model draws random numbers, as dropout does")
        with torch.no_grad():
            if len(inputs[0]) > 1:
                alone = self._output(one, inputs[0][:1])
                if not torch.allclose(alone, output[:1], rtol=_CLOSE, atol=_CLOSE):
                    raise UnsuitedError("its model mixes the examples of a batch")
            mean = self._rows(output, targets[0]).mean()
        if not torch.allclose(mean, whole, rtol=_CLOSE, atol=1e-6):
            raise UnsuitedError("its loss is no mean over the examples of a batch")


class _Stack:
    """Members who make as many steps, as one tensor."""

    def __init__(
        self, cohort: Cohort, model: Array, batches: list[Batches], seeds: list[int], work: Work
    ) -> None:
        self._cohort, self._batches, self._work = cohort, batches, work
        self._count = cohort.size_for(len(batches))
        self._start = torch.from_numpy(model)
        self._theta = cohort.room(self._count)
        self._theta.copy_(self._start)
        self._views = cohort.views(self._theta)
        self._filler = filler(batches, seeds, self._count)

    def run(self, steps: int, out: Array, rows: Sequence[int]) -> list[Outcome]:
        """All steps; what has moved is in those rows of `out`."""
        work, number = self._work, len(self._batches)
        move = self._simply if _is_simple(work) else self._mover()
        losses, seen = torch.zeros(number, dtype=torch.float64), torch.zeros(number, dtype=torch.float64)
        for step in range(steps):
            filled = self._filler.fill(step)
            arguments = (self._views, filled.inputs, filled.targets, filled.weights)
            with torch.no_grad():
                slopes, loss = self._cohort.step(arguments)(*arguments)
                move(slopes)
            counts = [
                size if step >= (0 if work.steps else steps - each.per_epoch) else 0
                for size, each in zip(filled.sizes, self._batches, strict=True)
            ]
            weight = torch.tensor(counts, dtype=torch.float64)
            losses += loss[:number].double() * weight
            seen += weight
        theta = self._theta[:number]
        if len(out) == number:  # the usual case: all members are here, in their order
            torch.sub(theta, self._start, out=torch.from_numpy(out))
        else:
            out[list(rows)] = (theta - self._start).numpy()
        means = (losses / seen).tolist()
        return [
            Outcome(each.size, {"train_loss": mean}) for each, mean in zip(self._batches, means, strict=True)
        ]

    def _simply(self, slopes: list[torch.Tensor]) -> None:
        """A step of plain SGD."""
        for view, slope in zip(self._views, slopes, strict=True):
            view.add_(slope, alpha=-self._work.learning_rate)

    def _mover(self) -> Callable[[list[torch.Tensor]], None]:
        """Steps of any optimiser, with a regulariser or without."""
        work, theta = self._work, self._theta.view(-1)
        whole = torch.empty_like(self._theta)
        rooms, gradient = self._cohort.views(whole), whole.view(-1)
        optimizer = InPlaceOptimizer(theta.numel())
        optimizer.begin(_optimizer_of(work))

        def move(slopes: list[torch.Tensor]) -> None:
            for slope, room in zip(slopes, rooms, strict=True):
                room.copy_(slope)
            if work.l1 or work.l2:
                optimizer.regularise(gradient, theta, l1=work.l1, l2=work.l2)
            optimizer.step(theta, gradient)

        return move


def _is_simple(work: Work) -> bool:
    return work.optimizer == "sgd" and not work.l1 and not work.l2


def _optimizer_of(work: Work) -> Optimizer:
    return Optimizer(work.optimizer, work.learning_rate, work.momentum, work.beta1, work.beta2, work.epsilon)
