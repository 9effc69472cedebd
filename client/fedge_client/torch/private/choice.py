"""Which way to compute clipped sums suits a model: tried on a few real examples, and compared with autograd.

A layer that no rule follows is found here. Nothing of the examples but "suited" or "not suited" comes out.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fedge_client.torch.batches import Batches
from fedge_client.torch.private.admission import check_private
from fedge_client.torch.private.book_keeping import BookKeeping
from fedge_client.torch.private.clipping import Clipping, Subject
from fedge_client.torch.private.general import PerExample
from fedge_client.torch.private.independence import TRIED, Trial, nearby
from fedge_client.torch.private.rows import row_of, tensors_of, with_tensors
from fedge_client.torch.private.single import OneByOne

_TOLERANCE = 1e-3


def choose(subject: Subject, batches: Batches) -> Clipping:
    """The fastest way that gives autograd's gradients, in train mode. The model must be loaded.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE; the examples of a batch depend on each other, or leave traces.
        TaskError: the data, or the task's model or loss, fails.
    """
    check_private(subject.flat.module)
    alone, general = OneByOne(subject), PerExample(subject)
    most = max(2, general.max_rows)  # one row alone shows little
    with nearby(subject.flat):
        trial = Trial(subject)
        inputs, target = trial.examples(batches, subject.losses, most=min(TRIED, most))
        trial.check_buffers(inputs)
        trial.check_independent(inputs)
        samples = [_Sample.of(trial, inputs, target), _Sample.of(trial, *map(_reversed, (inputs, target)))]
        for way in (BookKeeping.of(subject), general):
            # A forward that has just worked may fail under hooks, such as where it changes what a layer returns.
            with suppress(Exception):
                if way is not None and all(_agrees(way, trial, sample) for sample in samples):
                    return Clipping(way, alone)
        subject.flat.zero_gradient()
        trial.run(partial(alone.add, row_of(inputs, 0), row_of(target, 0), 1.0))
        return Clipping(alone, alone)


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """A few examples and the gradient of each by autograd, float32[n, trainable_size]."""

    inputs: Any
    target: Any
    gradients: torch.Tensor

    @classmethod
    def of(cls, trial: Trial, inputs: Any, target: Any) -> _Sample:
        """Each in a batch of its own, but where random numbers would then be others."""
        losses, rows = trial.subject.losses, range(len(tensors_of(target)[0]))
        if trial.is_random(inputs):
            found = list(trial.run(lambda: losses(inputs, target)))
        else:
            found = [trial.run(partial(losses, row_of(inputs, at), row_of(target, at)))[0] for at in rows]
        return cls(inputs, target, torch.stack([_gradient(trial.subject, loss) for loss in found]))

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


def _agrees(way: BookKeeping | PerExample, trial: Trial, sample: _Sample) -> bool:
    """Whether sums are right without a clip, and with one that scales most examples by a factor of their own.

    The second finds a forward that changes the order of rows and changes it back: where nothing is scaled, no
    sum shows which gradient belongs to whom.
    """
    median, flat = sample.median_norm(), trial.subject.flat
    if not median:  # no gradient to compare
        return False
    for clip in (float("inf"), median / 2):
        flat.zero_gradient()
        trial.run(partial(way.add, sample.inputs, sample.target, clip))
        found, expected = flat.gradient.clone(), sample.clipped_sum(clip)
        flat.zero_gradient()
        if not (found - expected).abs().max() <= _TOLERANCE * float(expected.abs().max()) + 1e-12:
            return False
    return True


def _reversed(value: Any) -> Any:
    return with_tensors(value, (tensor.flip(0) for tensor in tensors_of(value)))
