"""Evaluations of many clients at once: all judge the same model, so their examples go through it together.

Equal to the loop to float32's rounding. Loss and metrics are each client's own, on its part of what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Final

import torch
from torch.func import functional_call

from fedge.errors import TaskError
from fedge.task import Task
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_client.torch.batches import Batches
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module
from fedge_sim.engines.accelerator import HOST
from fedge_sim.engines.crew import UnsuitedError

MAX_BYTES: Final = 1 << 22
"""Of examples that go through the model at once; of one client there may be more."""

_CLOSE: Final = 1e-3

Pair = tuple[torch.Tensor, torch.Tensor]


class Judge:
    """Judges a task's model by the test sets of many clients: what it makes of their examples on a device, and what
    that is worth in this machine's memory, where losses and metrics are at home."""

    def __init__(self, task: Task, *, seed: int, device: torch.device = HOST) -> None:
        self._task, self._device = task, device
        self._flat = FlatModule(build_module(task, seed=seed))
        self._flat.module.eval()
        self._there: dict[str, torch.Tensor] = {}
        self._tried = False

    def judge(self, model: Array, tests: Sequence[Any]) -> list[Outcome | None]:
        """What `Trainer.evaluate` makes of `model` (float32[size]) by each of these sets; None of one that fails.

        Raises:
            UnsuitedError: they cannot be judged together: the model draws random numbers or mixes examples, or these
                are no tensors of one shape.
        """
        self._flat.load(model)
        if self._device != HOST:
            module = self._flat.module
            named = chain(module.named_parameters(), module.named_buffers())
            self._there = {name: value.detach().to(self._device) for name, value in named}
        found: list[Outcome | None] = []
        with torch.no_grad():
            for group in _groups(tests):
                outputs = self._outputs([pair[0] for pair in group if pair is not None])
                places = iter(outputs)
                before = torch.get_rng_state()
                found += [
                    self._outcome(next(places), pair[1]) if pair is not None else None for pair in group
                ]
                if not torch.equal(before, torch.get_rng_state()):
                    raise UnsuitedError("its loss or a metric draws random numbers")
        return found

    def _outputs(self, inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Of each client's inputs, as far as they can be told apart."""
        if not inputs:
            return []
        if len({(each.shape[1:], each.dtype) for each in inputs}) > 1:
            raise UnsuitedError("its test examples are of several shapes or types")
        whole = torch.cat(inputs)
        sizes = [len(each) for each in inputs]
        try:
            before = torch.get_rng_state()
            output = self._forward(whole)
            if not self._tried:
                self._try(before, output, inputs[0], whole)
                self._tried = True
        except UnsuitedError:
            raise
        except Exception as error:  # user code may raise anything; the loop will say more
            raise UnsuitedError(f"its examples cannot be judged together: {type(error).__name__}") from error
        return torch.split(output, sizes)

    def _forward(self, inputs: torch.Tensor) -> Any:
        """What the model gives for them, in this machine's memory."""
        if self._device == HOST:
            return self._flat.module(inputs)
        output = functional_call(self._flat.module, self._there, (inputs.to(self._device),))
        return output.cpu() if isinstance(output, torch.Tensor) else output

    def _try(self, before: torch.Tensor, output: Any, first: torch.Tensor, whole: torch.Tensor) -> None:
        """Whether rows that go in come out, each by itself."""
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise UnsuitedError("its model draws random numbers when it is judged")
        if not isinstance(output, torch.Tensor) or not output.ndim or len(output) != len(whole):
            raise UnsuitedError("what its model gives is not a row for each example")
        alone = self._forward(first)
        if not torch.allclose(alone, output[: len(first)], rtol=_CLOSE, atol=_CLOSE, equal_nan=True):
            raise UnsuitedError("its model mixes the examples that it is judged by")

    def _outcome(self, output: torch.Tensor, target: torch.Tensor) -> Outcome | None:
        try:
            loss = self._task.loss(output, target)
            if not isinstance(loss, torch.Tensor) or loss.ndim:
                return None
            metrics = {"loss": loss.item()}
            metrics |= {name: float(metric(output, target)) for name, metric in self._task.metrics.items()}
        except Exception:  # noqa: BLE001  # user code may raise anything; the loop will say what
            return None
        return Outcome(len(output), metrics)


def _groups(tests: Sequence[Any]) -> Iterator[list[Pair | None]]:
    """The examples of some clients at a time; None of those that cannot be read.

    Raises:
        UnsuitedError: they are no tensors.
    """
    group: list[Pair | None] = []
    held = 0
    for test in tests:
        pair = _examples(test)
        held += math.prod(pair[0].shape) * pair[0].element_size() if pair is not None else 0
        group.append(pair)
        if held >= MAX_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def _examples(test: Any) -> Pair | None:
    try:
        batches = Batches(test, "full")
        if batches.tensors is not None and batches.whole:
            return batches.tensors
        inputs, target = batches.gather(torch.arange(batches.size))
    except TaskError:
        return None
    if not isinstance(inputs, torch.Tensor) or not isinstance(target, torch.Tensor):
        raise UnsuitedError("its test examples are more than one tensor and one target")
    return inputs, target
