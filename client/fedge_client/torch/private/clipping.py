"""Clipped sums of per-example gradients: what every way to compute them promises, and the clipping itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fedge.errors import TaskError
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.private.rows import Loss, row_losses

PHYSICAL_ROWS = 64
"""Examples in one backward pass: a larger batch takes more passes, not more memory."""


class UnsuitedError(Exception):
    """The model does something that a way to compute clipped sums cannot follow; another way may."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is differentiated: a resident module, how it is called, and the loss of a batch."""

    flat: FlatModule
    forward: Callable[[Any], Any]
    loss: Loss

    def losses(self, inputs: Any, target: Any) -> torch.Tensor:
        """The loss of each example, float[n], from one forward of all.

        Raises:
            TaskError: forward or loss fails, or the loss does not depend on the parameters.
            RefusedError: MODEL_NOT_PRIVATE; see `row_losses`.
        """
        losses = row_losses(self.loss, self.forward(inputs), target)
        if not losses.requires_grad:
            raise TaskError(
                "expected a loss that depends on the model's parameters, found one without a gradient; "
                "compute it from the output with torch, without detach(), item() or no_grad()"
            )
        return losses

    def places(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each trainable parameter with its view of `flat.gradient` (float32, its shape)."""
        flat, named = self.flat, dict(self.flat.module.named_parameters(remove_duplicate=False))
        return [
            (named[spec.name], flat.gradient[where].view(spec.shape))
            for spec, where in zip(flat.layout.tensors, flat.layout.slices, strict=True)
            if spec.role == "trainable"
        ]


class ClippedSum(Protocol):
    """Adds clipped gradients of examples to `flat.gradient`.

    **Guarantees.** An example adds `min(1, clip / |g|) g`, of L2 norm at most `clip` (to float rounding)
    over the whole trainable head, where g is the gradient of its own loss. One whose loss or gradient is
    not finite, or whose norm overflows float32, adds exactly zero. No parameter, `.grad` or hook is left
    changed. Where `add` raises it may have added a part.
    """

    @property
    def max_rows(self) -> int:
        """How many examples one call takes at most, so that memory is bounded."""
        ...

    def add(self, inputs: Any, target: Any, clip: float) -> torch.Tensor:
        """Add the examples of one batch; returns their losses, float[n], detached.

        Raises:
            TaskError: the model or the loss fails.
            UnsuitedError: this way cannot follow the model.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Clipping:
    """How a model's clipped sums are computed: of a batch at once, and of the examples of one that fails."""

    together: ClippedSum
    alone: ClippedSum

    @property
    def max_rows(self) -> int:
        return self.together.max_rows


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What each example is multiplied by: `values` float32[k] of the examples `rows` (int64[k]).

    `rows` None means all of them in order. Left out are those that add nothing: zero times a gradient
    that is not finite would not be zero.
    """

    values: torch.Tensor
    rows: torch.Tensor | None

    @classmethod
    def of(cls, squares: torch.Tensor, losses: torch.Tensor, clip: float) -> Factors:
        """From squared norms (float64[n]) and losses."""
        norms = squares.sqrt()
        usable = torch.isfinite(norms) & torch.isfinite(losses.detach())
        # No division by 0: a zero gradient has the factor 1. What float32 holds with fewer bits may be twice as much.
        factors = torch.where(norms > clip, clip / norms, 1.0).to(torch.float32)
        factors[factors < torch.finfo(torch.float32).tiny] = 0
        if bool(usable.all()):
            return cls(factors, None)
        rows = usable.nonzero().squeeze(1)
        return cls(factors[rows], rows)

    def select(self, value: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor over all examples that these factors are for."""
        return value if self.rows is None else value[self.rows]


def squared(gradients: torch.Tensor) -> torch.Tensor:
    """Squared L2 norms of the rows of per-example gradients (float32[n, ...]), float64[n]."""
    norms: torch.Tensor = torch.linalg.vector_norm(gradients.reshape(len(gradients), -1), dim=1)
    return norms.to(torch.float64).square_()


def add_weighted(gradients: torch.Tensor, factors: Factors, into: torch.Tensor) -> None:
    """Add the weighted sum of per-example gradients (float32[n, ...], any strides) to `into`."""
    chosen = factors.select(gradients)  # possibly of no rows, hence no -1
    into.add_(torch.mv(chosen.reshape(len(chosen), into.numel()).t(), factors.values).view(into.shape))
