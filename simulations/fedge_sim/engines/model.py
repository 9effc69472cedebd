"""A task's model, many times: copies of it are the rows of one tensor, and a step of all is a few batched products.

The step is traced once from the task's own model and loss, by torch.func, for a number of clients and a size of batch;
what comes of it is a list of torch's own operations, without Python of the model or of torch.func between them.
Smaller batches are padded with examples that weigh nothing, smaller cohorts with clients that nobody asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fedge.task import Task
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module
from fedge_sim.engines.accelerator import HOST, memory
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.pool import Filled, Shelf
from fedge_sim.engines.trace import IN_PARTS, changes_arguments, flat, simplified, uses_last, with_short_norms

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

Slopes = tuple[list[torch.Tensor], torch.Tensor]
"""Of all clients: gradients, and losses float32[clients]."""


class StackedModel:
    """Copies of a task's model on a `device`, of which mostly `usual` are trained at once. Whether that can be done at
    all is looked at with the first examples, unless it is `known_to_suit`.

    Raises:
        UnsuitedError: the model holds more than float32 parameters: buffers, frozen or tied ones.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        usual: int = SIZES[-1],
        known_to_suit: bool = False,
        device: torch.device = HOST,
    ) -> None:
        self._task = task
        self.max_bytes, most_brought = MAX_STACK_BYTES, None
        if device != HOST:
            self.max_bytes, most_brought = memory(device) // _SHARE, memory(device) // 4
        self.shelf = Shelf(device, most_bytes=most_brought)
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
        self._room: torch.Tensor | None = None
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._tried = known_to_suit

    @property
    def most(self) -> int:
        """Copies in a stack."""
        return max(1, min(self._sizes[-1], self.max_bytes // (4 * self.size)))

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

    def step(self, parameters: list[torch.Tensor], batch: Filled) -> Slopes:
        """The gradients and losses of a step; the first one with arguments of these shapes is traced.

        Raises:
            UnsuitedError: torch.func cannot do it, or it is not what the task's own loss says; or the task's code
                fails, of which the loop will say more.
        """

        def of_one(parameters: Any, inputs: Any, targets: Any, weights: Any) -> Any:  # no bound method
            return self._mean_loss(parameters, inputs, targets, weights)

        *slopes, losses = self._stepped((), of_one, parameters, batch)
        return slopes, losses

    def clipped(self, parameters: list[torch.Tensor], batch: Filled, clip: float) -> list[torch.Tensor]:
        """The sums of the gradients of each client's examples, each of these at most `clip` in L2 norm: as
        `fedge_client.torch.private.clipping` has it, of examples that weigh 1.

        Raises:
            UnsuitedError: as `step`, or the model does more than compute.
        """
        *sums, usable = self.factored(parameters, batch, clip)
        return sums if bool(usable.all()) else self._of_usable(parameters, batch, clip)

    def factored(self, parameters: list[torch.Tensor], batch: Filled, clip: float) -> list[torch.Tensor]:
        """As `clipped`, where each example has a finite gradient; and behind the sums whether it has, bool[clients,
        examples]."""

        def of_one(parameters: Any, inputs: Any, targets: Any, weights: Any) -> Any:
            return self._factored(parameters, inputs, targets, weights, clip)

        return self._stepped(("factored", clip), of_one, parameters, batch)

    def _of_usable(self, parameters: list[torch.Tensor], batch: Filled, clip: float) -> list[torch.Tensor]:
        """As `clipped`, where some have none: zero times one that is not finite would not be zero."""

        def of_one(parameters: Any, inputs: Any, targets: Any, weights: Any) -> Any:
            slopes, usable, weighted = self._by_example(parameters, inputs, targets, weights, clip)
            finite = (torch.where(usable[:, None], slope.flatten(1), 0.0) for slope in slopes)
            sums = ((each * weighted[:, None]).sum(0) for each in finite)
            return [each.view(slope.shape[1:]) for each, slope in zip(sums, slopes, strict=True)]

        return self._stepped(("of usable", clip), of_one, parameters, batch)

    def _stepped(
        self,
        private: tuple[Any, ...],
        of_one: Callable[..., Any],
        parameters: list[torch.Tensor],
        batch: Filled,
    ) -> list[torch.Tensor]:
        """A function of one client, of all of them."""
        inputs, targets, weights = batch.inputs, batch.targets, batch.weights
        key = (private, inputs.shape, inputs.dtype, targets.shape, targets.dtype)
        try:
            if key not in self._steps:
                if not self._tried:
                    self._try(parameters, inputs, targets, private=bool(private))
                    self._tried = True
                graph = make_fx(vmap(of_one), IN_PARTS)(parameters, inputs, targets, weights)
                if not uses_last(graph):  # which is what the rows weigh
                    raise UnsuitedError(f"what is computed on {self.shelf.device} cannot be traced")
                if private and changes_arguments(graph):
                    raise UnsuitedError("its model changes what it is given")
                graph = simplified(graph, self.shelf.device)
                self._steps[key] = flat(with_short_norms(graph) if private else graph)
            with torch.inference_mode():
                return self._steps[key](*parameters, inputs, targets, weights)
        except (UnsuitedError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # user code under torch.func may raise anything, and what it became, too
            raise UnsuitedError(f"torch.func cannot do it: {type(error).__name__}: {error}"[:300]) from error

    def _mean_loss(self, parameters: Any, inputs: Any, targets: Any, weights: Any) -> Any:
        """The gradient of one client's loss, and the loss."""

        def loss(parameters: list[torch.Tensor]) -> torch.Tensor:
            output = self._output(parameters, inputs)
            mean: torch.Tensor = (self._rows(output, targets) * weights).sum() / weights.sum()
            return mean

        return grad_and_value(loss)(parameters)

    def _factored(
        self, parameters: Any, inputs: Any, targets: Any, weights: torch.Tensor, clip: float
    ) -> list[torch.Tensor]:
        """The sum of gradients, each times a factor, is one gradient: only norms need those of examples."""
        _, usable, weighted = self._by_example(parameters, inputs, targets, weights, clip)
        pull = vjp(lambda at: vmap(self._loss_of, (None, 0, 0))(at, inputs, targets), parameters)[1]
        return [*pull(weighted)[0], usable]

    def _by_example(
        self, parameters: Any, inputs: Any, targets: Any, weights: torch.Tensor, clip: float
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """The gradients of one client's examples, each of which goes through the model by itself; whether they are
        usable, bool[n], and what they are multiplied by, float32[n]: as `fedge_client.torch.private.clipping.Factors`,
        and 0 for what is not usable."""
        slopes, losses = vmap(grad_and_value(self._loss_of), (None, 0, 0))(parameters, inputs, targets)
        norms = [torch.linalg.vector_norm(slope.flatten(1), dim=1) for slope in slopes]
        norm = torch.stack([each.double().square() for each in norms]).sum(0).sqrt()
        usable = torch.isfinite(norm) & torch.isfinite(losses)
        factors = torch.where(norm > clip, clip / norm, 1.0).float()
        counted = usable & (factors >= torch.finfo(torch.float32).tiny)
        return slopes, usable, torch.where(counted, factors, 0.0) * weights

    def _loss_of(
        self, parameters: list[torch.Tensor], one: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Of one example."""
        found: torch.Tensor = self._task.loss(self._output(parameters, one[None]), wanted[None])
        return found

    def _output(self, parameters: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self._names, parameters, strict=True))
        found: torch.Tensor = functional_call(self._flat.module, named, (inputs,))
        return found

    def _rows(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = vmap(lambda one, wanted: self._task.loss(one[None], wanted[None]))(
            output, targets
        )
        return rows

    def _try(
        self, parameters: list[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor, *, private: bool
    ) -> None:
        """Whether the model draws no random numbers, keeps rows apart, and has a loss that is a mean over rows; the
        last two do not matter where each example goes through it by itself."""
        one = [parameter[0].cpu() for parameter in parameters]
        # Examples of all members: those of one may be of one class, say, where a loss shows less of itself.
        rows, wanted = inputs.flatten(0, 1), targets.flatten(0, 1)
        apart = max(1, len(rows) // _TRIED)
        # In this machine's memory, where what draws random numbers is seen.
        rows, wanted = rows[::apart].to("cpu", copy=True), wanted[::apart].cpu()
        before = _Drawn.by_now()
        with torch.no_grad():
            output = self._output(one, rows)
            whole = self._task.loss(output, wanted)
        if before.put_back():
            raise UnsuitedError("its model draws random numbers, as dropout does")
        if private:
            return
        with torch.no_grad():
            if len(rows) > 1:
                alone = self._output(one, rows[:1])
                if not torch.allclose(alone, output[:1], rtol=_CLOSE, atol=_CLOSE):
                    raise UnsuitedError("its model mixes the examples of a batch")
            mean = self._rows(output, wanted).mean()
        if not torch.allclose(mean, whole, rtol=_CLOSE, atol=1e-6):
            raise UnsuitedError("its loss is no mean over the examples of a batch")


class _Drawn:
    """Where the global generators are."""

    def __init__(self, numbers: torch.Tensor, python: Any, legacy: Any) -> None:
        self._torch, self._python, self._numpy = numbers, python, legacy

    @classmethod
    def by_now(cls) -> _Drawn:
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False))

    def put_back(self) -> bool:
        """Whether somebody has drawn from them since; then it is undone."""
        now = _Drawn.by_now()
        numbers, others = self._numpy["state"], now._numpy["state"]
        same = torch.equal(self._torch, now._torch) and self._python == now._python
        if same and numbers["pos"] == others["pos"] and np.array_equal(numbers["key"], others["key"]):
            return False
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        return True
