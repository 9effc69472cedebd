"""Which way to compute clipped sums suits a model: tried on a few real examples, and compared with autograd.

What only examples show is found here: a forward that mixes the rows of a batch, a layer that no rule follows.
Nothing of the examples but "suited" or "not suited, and why" comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from fedge.errors import TaskError
from fedge_client.torch.batches import Batches
from fedge_client.torch.private.admission import check_private, refuse
from fedge_client.torch.private.book_keeping import BookKeeping
from fedge_client.torch.private.clipping import ClippedSum, Subject, UnsuitedError
from fedge_client.torch.private.general import PerExample
from fedge_client.torch.private.rows import check_rows, tensors_of
from fedge_client.torch.private.single import OneByOne
from fedge_client.torch.seeded import GlobalRandomness

_SEED = 1
_TRIED = 3
_TOLERANCE = 1e-3


def choose(subject: Subject, batches: Batches) -> ClippedSum:
    """The fastest way that gives autograd's gradients, in train mode. The model must be loaded.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE; the examples of a batch depend on each other.
        TaskError: the data, or the task's model or loss, fails.
    """
    check_private(subject.flat.module)
    check_independent(subject, batches)
    general = PerExample(subject)
    inputs, target = batches.gather(torch.arange(min(_TRIED, batches.size, general.max_rows)))
    expected = _seeded(lambda: _plain(subject, inputs, target))
    for way in (BookKeeping.of(subject), general):
        # A forward that has just worked may fail under hooks, such as where it changes what a layer returns.
        with suppress(UnsuitedError, TaskError):
            if way is not None and _agrees(way, subject, inputs, target, expected):
                return way
    return OneByOne(subject)


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


def _plain(subject: Subject, inputs: Any, target: Any) -> torch.Tensor:
    """The sum of the examples' gradients by autograd, float32[trainable_size]."""
    parameters = [parameter for parameter, _ in subject.places()]
    gradients = torch.autograd.grad(subject.losses(inputs, target).sum(), parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(parameter.numel()) if gradient is None else gradient.reshape(-1).to(torch.float32)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    )


def _agrees(clipped: ClippedSum, subject: Subject, inputs: Any, target: Any, expected: torch.Tensor) -> bool:
    flat = subject.flat
    flat.zero_gradient()
    _seeded(lambda: clipped.add(inputs, target, float("inf")))
    found = flat.gradient.clone()
    flat.zero_gradient()
    if not torch.isfinite(expected).all():
        return True  # an example without a finite gradient is left out: nothing to compare with
    scale = float(expected.abs().max())
    return bool((found - expected).abs().max() <= _TOLERANCE * scale + 1e-12)


def _seeded(work: Callable[[], Any]) -> Any:
    with GlobalRandomness().seeded(_SEED):
        return work()
