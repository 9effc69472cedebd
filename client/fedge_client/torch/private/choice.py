"""Which way to compute clipped sums suits a model: tried on a few real examples, and compared with autograd.

What only examples show is found here: a forward that mixes the rows of a batch, a layer that no rule follows.
Nothing of the examples but "suited" or "not suited, and why" comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fedge.errors import TaskError
from fedge_client.torch.batches import Batches
from fedge_client.torch.private.admission import check_private, refuse
from fedge_client.torch.private.book_keeping import BookKeeping
from fedge_client.torch.private.clipping import ClippedSum, Subject, UnsuitedError
from fedge_client.torch.private.general import PerExample
from fedge_client.torch.private.rows import check_rows, tensors_of, with_tensors
from fedge_client.torch.private.single import OneByOne
from fedge_client.torch.seeded import GlobalRandomness

_SEED = 1
_TRIED = 6
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Clipping:
    """How a model's clipped sums are computed: of a batch at once, and of the examples of one that fails."""

    together: ClippedSum
    alone: OneByOne

    @property
    def max_rows(self) -> int:
        return self.together.max_rows


def choose(subject: Subject, batches: Batches) -> Clipping:
    """The fastest way that gives autograd's gradients, in train mode. The model must be loaded.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE; the examples of a batch depend on each other.
        TaskError: the data, or the task's model or loss, fails.
    """
    check_private(subject.flat.module)
    check_independent(subject, batches)
    alone, general = OneByOne(subject), PerExample(subject)
    inputs, target = batches.gather(torch.arange(min(_TRIED, batches.size, general.max_rows)))
    samples = [_Sample.of(subject, inputs, target), _Sample.of(subject, *map(_reversed, (inputs, target)))]
    for way in (BookKeeping.of(subject), general):
        # A forward that has just worked may fail under hooks, such as where it changes what a layer returns.
        with suppress(UnsuitedError, TaskError):
            if way is not None and all(_agrees(way, subject, sample) for sample in samples):
                return Clipping(way, alone)
    return Clipping(alone, alone)


def check_independent(subject: Subject, batches: Batches) -> None:
    """Refuse a model whose output for one example depends on the others of its batch.

    The first example is put beside the second and beside the third, under the same seed: its row of the
    output must be the same. A site of a single example has no batch to mix.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE.
    """
    if batches.size == 1:
        return
    pairs = [[0, 0], [0, 1]] if batches.size == 2 else [[0, 1], [0, 2]]
    found = []
    for pair in pairs:
        inputs, _ = batches.gather(torch.tensor(pair))
        with torch.no_grad():
            output = _seeded(partial(subject.forward, inputs))
        check_rows(output, 2, what="the model's output")
        found.append([tensor[0] for tensor in tensors_of(output)])
    for one, other in zip(*found, strict=True):
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True):
            refuse(
                "the model's output for one example depends on the other examples of its batch, so that clipping "
                "bounds nothing: compute each row from its own input (no statistics over dimension 0)"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """A few examples and the gradient of each by autograd, float32[n, trainable_size]."""

    inputs: Any
    target: Any
    gradients: torch.Tensor

    @classmethod
    def of(cls, subject: Subject, inputs: Any, target: Any) -> _Sample:
        losses = _seeded(lambda: subject.losses(inputs, target))
        return cls(inputs, target, torch.stack([_gradient(subject, loss) for loss in losses]))

    def clipped_sum(self, clip: float) -> torch.Tensor:
        """By the definition. An example without a finite gradient is left out."""
        norms = self.gradients.norm(dim=1)
        usable = torch.isfinite(norms)
        factors = (clip / norms[usable].clamp(min=1e-30)).clamp(max=1.0)
        total: torch.Tensor = (self.gradients[usable] * factors[:, None]).sum(0)
        return total

    def median_norm(self) -> float:
        """Of the usable gradients; 0 if there is none."""
        norms = self.gradients.norm(dim=1)
        norms = norms[torch.isfinite(norms)]
        return float(norms.median()) if len(norms) else 0.0


def _gradient(subject: Subject, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of one example's loss, float32[trainable_size]."""
    parameters = [parameter for parameter, _ in subject.places()]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [
            torch.zeros(parameter.numel()) if gradient is None else gradient.reshape(-1).to(torch.float32)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    )


def _agrees(way: ClippedSum, subject: Subject, sample: _Sample) -> bool:
    """Whether sums are right without a clip, and with one that scales most examples by a factor of their own.

    The second finds a forward that changes the order of rows and changes it back: where nothing is scaled, no
    sum shows which gradient belongs to whom.
    """
    median = sample.median_norm()
    if not median:  # no gradient to compare
        return False
    for clip in (float("inf"), median / 2):
        subject.flat.zero_gradient()
        _seeded(partial(way.add, sample.inputs, sample.target, clip))
        found, expected = subject.flat.gradient.clone(), sample.clipped_sum(clip)
        subject.flat.zero_gradient()
        if not (found - expected).abs().max() <= _TOLERANCE * float(expected.abs().max()) + 1e-12:
            return False
    return True


def _reversed(value: Any) -> Any:
    return with_tensors(value, (tensor.flip(0) for tensor in tensors_of(value)))


def _seeded(work: Callable[[], Any]) -> Any:
    with GlobalRandomness().seeded(_SEED):
        return work()
