"""Clipped sums by Opacus: per-example gradients of every parameter, from hooks on every kind of module it knows.

For layers that book-keeping has no rule for: slower and larger in memory, since every gradient is made whole.
Opacus's ghost clipping is not used: it clips inside its own loss and optimiser, and book-keeping does the same
with one backward pass instead of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedge_client.torch.private.clipping import Factors, Subject, UnsuitedError, add_weighted, squared

_MAX_ELEMENTS = 1 << 25
"""Elements of per-example gradients in one pass: 128 MiB."""


class PerExample:
    """`ClippedSum` for models that Opacus can do."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._places = subject.places()
        size = max(1, sum(parameter.numel() for parameter, _ in self._places))
        self.max_rows = max(1, min(64, _MAX_ELEMENTS // size))

    def add(self, inputs: Any, target: Any, clip: float) -> torch.Tensor:
        """See `ClippedSum.add`.

        Raises:
            UnsuitedError: Opacus cannot do this model.
        """
        module = self._subject.flat.module
        with _out_of_place(module), _sampling(module), _own_gradients(self._places):
            losses = self._subject.losses(inputs, target)
            try:
                losses.sum().backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
            except Exception as error:  # hooks of Opacus meet modules that it does not know
                raise UnsuitedError(f"Opacus fails with {type(error).__name__}") from error
            losses = losses.detach()
            samples = [(self._sample(parameter, len(losses)), view) for parameter, view in self._places]
            squares = torch.zeros(len(losses), dtype=torch.float64)
            for sample, _ in samples:
                squares += squared(sample)
            factors = Factors.of(squares, losses, clip)
            for sample, view in samples:
                add_weighted(sample, factors, view)
        return losses

    def _sample(self, parameter: nn.Parameter, count: int) -> torch.Tensor:
        sample = getattr(parameter, "grad_sample", None)
        if sample is None and parameter.grad is None:
            return torch.zeros(count, *parameter.shape)  # it has no part in this loss
        if not isinstance(sample, torch.Tensor) or len(sample) != count:
            raise UnsuitedError(f"Opacus finds no gradient for each of {count} examples")
        return sample.to(torch.float32)


@contextmanager
def _out_of_place(module: nn.Module) -> Iterator[None]:
    """Opacus's hooks do not bear that a layer's output is changed in place."""
    parts = [part for part in module.modules() if getattr(part, "inplace", False) is True]
    for part in parts:
        part.inplace = False  # type: ignore[assignment]  # a plain attribute of activations and dropouts
    try:
        yield
    finally:
        for part in parts:
            part.inplace = True  # type: ignore[assignment]  # as above


@contextmanager
def _sampling(module: nn.Module) -> Iterator[None]:
    """Hooks that make `grad_sample`s; nothing of them is left behind."""
    from opacus import GradSampleModule  # a hundred megabytes: only where it is used

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on modules whose inputs have no gradient
        try:
            wrapped = GradSampleModule(module, batch_first=True, loss_reduction="sum", strict=False)
        except Exception as error:  # NotImplementedError, ValueError, or what a module raises
            raise UnsuitedError(f"Opacus fails with {type(error).__name__}") from error
        try:
            yield
        finally:
            wrapped.remove_hooks()
            for parameter in module.parameters():
                for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                    if hasattr(parameter, name):
                        delattr(parameter, name)


@contextmanager
def _own_gradients(places: list[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Keeps the unclipped sums, which backward makes as well, out of the flat gradient."""
    bound = [parameter.grad for parameter, _ in places]
    for parameter, _ in places:
        parameter.grad = None
    try:
        yield
    finally:
        for (parameter, _), gradient in zip(places, bound, strict=True):
            parameter.grad = gradient
