"""Whether the examples of a batch are independent of each other, tried on a few real ones.

What only examples show is found here: a forward that mixes the rows of a batch, or keeps something of one batch for
the next. Nothing of the examples but "independent" or "not, and why" comes out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from fedge.errors import FedgeError
from fedge_client.torch.batches import Batches
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.private.admission import refuse
from fedge_client.torch.private.clipping import Subject
from fedge_client.torch.private.rows import check_rows, row_of, tensors_of, with_tensors
from fedge_client.torch.private.steps import check_unchanged
from fedge_client.torch.seeded import GlobalRandomness

T = TypeVar("T")

TRIED = 6
"""How many examples a model is tried with, at most."""

_SEED = 1


class Trial:
    """A model at values near those that it has, which is called with a few examples, and put back after each call."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._buffers = subject.flat.buffers()

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, with the same random numbers each time."""
        try:
            with GlobalRandomness().seeded(_SEED):
                return work()
        finally:
            self.subject.flat.put_back(self._buffers)

    def examples(
        self, batches: Batches, judge: Callable[[Any, Any], object], *, most: int = TRIED
    ) -> tuple[Any, Any]:
        """A batch of up to `most` examples, of those on which `judge` works by themselves.

        They are from all over the data set: neighbours are often alike.

        Raises:
            FedgeError: what the last of them raises, where none works.
        """
        found: list[torch.Tensor] = []
        trouble: FedgeError | None = None
        positions = torch.linspace(0, batches.size - 1, min(batches.size, most)).round().to(torch.int64)
        for position in torch.split(positions, 1):
            try:
                self.run(partial(judge, *batches.gather(position)))
                found.append(position)
            except FedgeError as error:
                trouble = error
        if trouble is not None and not found:
            raise trouble
        return batches.gather(torch.cat(found))

    def output(self, inputs: Any) -> list[torch.Tensor]:
        """The tensors of the model's output, each with one row for each example."""
        with torch.no_grad():
            output = self.run(partial(self.subject.forward, inputs))
        check_rows(output, len(tensors_of(inputs)[0]), what="the model's output")
        return tensors_of(output)

    def is_random(self, inputs: Any) -> bool:
        """Whether the model draws random numbers, as a dropout does: then the next ones are others."""

        def drawn_next(*, after: bool) -> tuple[float, ...]:
            if after:
                self.subject.forward(inputs)
            return float(torch.rand(1)), float(np.random.rand()), random.random()  # noqa: S311  # no secret

        with torch.no_grad():
            return self.run(partial(drawn_next, after=True)) != self.run(partial(drawn_next, after=False))

    def check_buffers(self, inputs: Any) -> None:
        """Refuse a model whose forward changes buffers of its state.

        Raises:
            RefusedError: MODEL_NOT_PRIVATE.
        """
        flat = self.subject.flat
        tail = flat.theta[flat.layout.trainable_size :]

        def changes() -> torch.Tensor:
            before = tail.clone()
            self.subject.forward(inputs)
            flat.settle()
            return tail - before

        check_unchanged(self.run(changes).numpy())

    def check_independent(self, inputs: Any) -> None:
        """Refuse a model whose output for one example depends on the others of its batch, or on there being others.

        Each example keeps its row while those around it are exchanged, under the same random numbers.

        Raises:
            RefusedError: MODEL_NOT_PRIVATE.
            TaskError: the model fails, be it with a single example.
        """
        count = len(tensors_of(inputs)[0])
        whole, draws = self.output(inputs), self.is_random(inputs)
        for at in range(count):
            index = (torch.arange(count) + 1) % count
            index[at] = at
            others = with_tensors(inputs, (tensor[index] for tensor in tensors_of(inputs)))
            alone = self.output(row_of(inputs, at))
            row = [tensor[at : at + 1] for tensor in whole]
            among_others = [tensor[at : at + 1] for tensor in self.output(others)]
            if not _same(row, among_others) or not (draws or _same(row, alone)):
                refuse(
                    "the model's output for one example depends on the other examples of its batch, so that "
                    "clipping bounds nothing: compute each row from its own input (no statistics over dimension 0)"
                )


@contextmanager
def nearby(flat: FlatModule) -> Iterator[None]:
    """Within the block every parameter is a little off: behind a layer of zeros nothing would show."""
    kept, generator = flat.head.clone(), torch.Generator().manual_seed(_SEED)
    for spec, where in zip(flat.layout.tensors, flat.layout.slices, strict=True):
        if spec.role == "trainable" and where.stop > where.start:
            part = flat.head[where]
            size = 0.1 * float(part.abs().mean()) + 0.01
            part.add_(torch.randn(part.shape, generator=generator), alpha=size)
    flat.publish()
    try:
        yield
    finally:
        flat.head.copy_(kept)
        flat.publish()


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        mine.shape == yours.shape and torch.allclose(mine, yours, rtol=1e-4, atol=1e-6, equal_nan=True)
        for mine, yours in zip(one, other, strict=True)
    )
