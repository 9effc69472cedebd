"""Clipped sums by the definition: one example after another, by plain autograd.

As slow as it is simple, and right for every model whose rows are independent: the way for those that neither
book-keeping nor Opacus can follow, for batches in which something fails, and what both are compared with in the tests.
"""

from __future__ import annotations

from typing import Any

import torch

from fedge_client.torch.private.clipping import PHYSICAL_ROWS, Factors, Subject
from fedge_client.torch.private.rows import row_of, tensors_of


class OneByOne:
    """`ClippedSum` for any model."""

    max_rows = PHYSICAL_ROWS

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._places = subject.places()

    def add(self, inputs: Any, target: Any, clip: float) -> torch.Tensor:
        """See `ClippedSum.add`."""
        count = len(tensors_of((target, inputs))[0])
        return torch.cat([self._add_one(row_of(inputs, at), row_of(target, at), clip) for at in range(count)])

    def _add_one(self, inputs: Any, target: Any, clip: float) -> torch.Tensor:
        losses = self._subject.losses(inputs, target)
        parameters = [parameter for parameter, _ in self._places]
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        square = torch.zeros(1, dtype=torch.float64)
        for gradient in gradients:
            if gradient is not None:
                square += gradient.to(torch.float64).square().sum()
        factors = Factors.of(square, losses, clip)
        if len(factors.values):
            for (_, view), gradient in zip(self._places, gradients, strict=True):
                if gradient is not None:
                    view.add_(gradient.to(torch.float32), alpha=float(factors.values[0]))
        return losses.detach()
