"""Many clients at once: their models are the rows of one tensor, and a step of all of them is a few batched products.

The step is traced once from the task's own model and loss, by torch.func, for a number of clients and a size of batch;
what comes of it is a list of torch's own operations, without Python of the model or of torch.func between them.
Smaller batches are padded with examples that weigh nothing, smaller cohorts with clients that nobody asked.

Equal to the loop to float32's rounding. What cannot be done so (`UnsuitedError`) is left to the loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fedge.run import Work
from fedge.task import Task
from fedge_client.torch.batches import Batches, Order
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module
from fedge_client.torch.trainer import Outcome
from fedge_sim.engines.accelerator import HOST, memory
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.pool import Part, Shelf
from fedge_sim.engines.stack import Arguments, Slopes, gradient_stack, train_stack
from fedge_sim.engines.trace import IN_PARTS, flat, simplified, uses_last

SIZES = (4, 8, 16, 32, 64, 128, 256)
"""Clients in a stack: the smallest of these that holds a cohort is traced."""

MAX_STACK_BYTES = 1 << 28
"""Of the clients' vectors, once, in this machine's memory: gradients and optimisers take as much again, two to four
times."""

_SHARE = 16
"""Of an accelerator's memory, one such part is for the clients' vectors."""

_TRIED = 128
"""Examples on which model and loss are looked at."""

_CLOSE = 1e-3
"""What a mean over rows may differ by from the task's own loss, relative to it, and still be it."""


Step = Callable[..., list[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Member:
    """One client's part: its training set, and the seed of its work."""

    train: Any
    seed: int


class Cohort:
    """Trains cohorts of a task's model, of which the most have `usual` members; the batches of `most_known` training
    sets are kept. They lie on a `device`. Whether it can be done at all is looked at with the first cohort's examples,
    unless it is `known_to_suit`.

    Raises:
        UnsuitedError: the model holds more than float32 parameters: buffers, frozen or tied ones.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        usual: int = SIZES[-1],
        most_known: int = SIZES[-1],
        known_to_suit: bool = False,
        device: torch.device = HOST,
    ) -> None:
        self._task = task
        self._max_bytes, most_brought = MAX_STACK_BYTES, None
        if device != HOST:
            self._max_bytes, most_brought = memory(device) // _SHARE, memory(device) // 4
        self.shelf = Shelf(device, most_bytes=most_brought)
        self._most_known = most_known
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
        self._room: torch.Tensor | None = None
        self._known: OrderedDict[int, tuple[Any, Any, Batches]] = OrderedDict()
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._tried = known_to_suit

    @property
    def most(self) -> int:
        """Clients in a stack."""
        return max(1, min(self._sizes[-1], self._max_bytes // (4 * self.size)))

    def train(
        self, model: torch.Tensor, members: Sequence[Member], work: Work, out: torch.Tensor
    ) -> list[Outcome]:
        """Train every member from `model` (float32[size]); row i of `out` (float32[members, size]) is what member i has
        moved by; both lie where the cohort does. As `Trainer.train`.

        Raises:
            UnsuitedError: the model or the loss cannot be done for all at once.
            TaskError: a member's data cannot be read.
        """
        batches = [self._batches_of(member.train, work) for member in members]
        parts = [
            Part(each, member.seed, work.steps or (work.epochs or 1) * each.per_epoch)
            for each, member in zip(batches, members, strict=True)
        ]
        # Those with the most steps first: at each step those who are still at it are the first so many.
        order = sorted(range(len(parts)), key=lambda at: -parts[at].steps)
        if order == list(range(len(parts))) and len(parts) <= self.most:
            return train_stack(self, model, parts, work, out)
        outcomes: dict[int, Outcome] = {}
        for start in range(0, len(order), self.most):
            some = order[start : start + self.most]
            moved = out.new_empty((len(some), self.size))
            done = train_stack(self, model, [parts[at] for at in some], work, moved)
            out[some] = moved
            outcomes |= zip(some, done, strict=True)
        return [outcomes[at] for at in range(len(members))]

    def gradient(
        self, model: torch.Tensor, members: Sequence[Member], work: Work, out: torch.Tensor, *, step: int
    ) -> list[Outcome]:
        """Every member's gradient at `model` (float32[size]) on its batch of `step`, to the rows of `out`. As
        `Trainer.gradient`; there are at most `most` members.

        Raises:
            UnsuitedError, TaskError: as `train`.
        """
        parts = [Part(self._batches_of(each.train, work), each.seed, step + 1) for each in members]
        return gradient_stack(self, model, parts, step, work, out)

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

    def room(self, members: int) -> torch.Tensor:
        """Memory for the vectors of a stack: the same for each stack of a size."""
        if self._room is None or len(self._room) != members:
            self._room = torch.empty(members, self.size, device=self.shelf.device)
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

    def step(self, arguments: Arguments) -> Slopes:
        """The gradients and losses of a step; the first one with arguments of these shapes is traced.

        Raises:
            UnsuitedError: torch.func cannot do it, or it is not what the task's own loss says; or the task's code
                fails, of which the loop will say more.
        """
        parameters, inputs, targets, weights = arguments
        key = (inputs.shape, inputs.dtype, targets.shape, targets.dtype)
        try:
            if key not in self._steps:
                if not self._tried:
                    self._try(parameters, inputs, targets)
                    self._tried = True
                self._steps[key] = self._traced(*arguments)
            with torch.inference_mode():
                *slopes, losses = self._steps[key](*parameters, inputs, targets, weights)
            return slopes, losses
        except (UnsuitedError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # user code under torch.func may raise anything, and what it became, too
            raise UnsuitedError(f"torch.func cannot do it: {type(error).__name__}: {error}"[:300]) from error

    def _traced(self, *arguments: Any) -> Step:
        def loss(parameters: Any, inputs: Any, targets: Any, weights: Any) -> torch.Tensor:  # no bound method
            return self._loss_of_one(parameters, inputs, targets, weights)

        graph = make_fx(vmap(grad_and_value(loss)), IN_PARTS)(*arguments)
        if not uses_last(graph):  # which is what the rows weigh
            raise UnsuitedError(f"what is computed on {self.shelf.device} cannot be traced")
        return flat(simplified(graph, self.shelf.device))

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
        one = [parameter[0].cpu() for parameter in parameters]
        # Examples of all members: those of one may be of one class, say, where a loss shows less of itself.
        rows, wanted = inputs.flatten(0, 1), targets.flatten(0, 1)
        apart = max(1, len(rows) // _TRIED)
        # In this machine's memory, where what draws random numbers is seen.
        rows, wanted = rows[::apart].to("cpu", copy=True), wanted[::apart].cpu()
        before = torch.get_rng_state()
        with torch.no_grad():
            output = self._output(one, rows)
            whole = self._task.loss(output, wanted)
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise UnsuitedError("its model draws random numbers, as dropout does")
        with torch.no_grad():
            if len(rows) > 1:
                alone = self._output(one, rows[:1])
                if not torch.allclose(alone, output[:1], rtol=_CLOSE, atol=_CLOSE):
                    raise UnsuitedError("its model mixes the examples of a batch")
            mean = self._rows(output, wanted).mean()
        if not torch.allclose(mean, whole, rtol=_CLOSE, atol=1e-6):
            raise UnsuitedError("its loss is no mean over the examples of a batch")
