"""The optimisers of `fedge.optimizer`, in place on flat torch vectors.

The pure functions there are the reference; these agree with them to float tolerance and allocate
nothing per step. No torch.optim: constructing one costs more than a small client's whole training.
"""

from __future__ import annotations

import math

import torch

from fedge.optimizer import Optimizer
from fedge.run import Work


class InPlaceOptimizer:
    """One optimiser's state for vectors of `size` elements on a device, reused from client to client."""

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self._size, self._device = size, device
        self._slots: list[torch.Tensor] = []
        self._scratch = torch.empty(0)
        self._optimizer = Optimizer()
        self._powers = (1.0, 1.0)

    def begin(self, optimizer: Optimizer) -> None:
        """Start anew: slots of zeros, and from now on `optimizer`'s settings."""
        self._optimizer = optimizer
        while len(self._slots) < optimizer.slot_count:
            self._slots.append(torch.empty(self._size, device=self._device))
        for slot in self._slots[: optimizer.slot_count]:
            slot.zero_()
        self._powers = (1.0, 1.0)

    def step(self, theta: torch.Tensor, gradient: torch.Tensor) -> None:
        """Move `theta` (float32[size]) in place by one step; `gradient` is left as it was."""
        optimizer = self._optimizer
        if optimizer.kind == "sgd":
            theta.add_(gradient, alpha=-optimizer.learning_rate)
        elif optimizer.kind == "momentum":
            velocity = self._slots[0].mul_(optimizer.momentum).add_(gradient)
            theta.add_(velocity, alpha=-optimizer.learning_rate)
        else:
            self._adam(theta, gradient)

    def regularise(
        self, gradient: torch.Tensor, theta: torch.Tensor, anchor: torch.Tensor, work: Work
    ) -> None:
        """Add to `gradient` that of `l1 * sum|theta| + l2/2 * sum(theta^2) + proximal/2 * sum((theta - anchor)^2)`, in
        place. `gradient` and `theta` are float32 of one shape and `size` elements; `anchor` is expanded to it."""
        if work.l2:
            gradient.add_(theta, alpha=work.l2)
        if work.l1:
            gradient.add_(torch.sign(theta, out=self._room().view_as(theta)), alpha=work.l1)
        if work.proximal:
            gradient.add_(torch.sub(theta, anchor, out=self._room().view_as(theta)), alpha=work.proximal)

    def _adam(self, theta: torch.Tensor, gradient: torch.Tensor) -> None:
        optimizer, (mean, square) = self._optimizer, self._slots[:2]
        mean.mul_(optimizer.beta1).add_(gradient, alpha=1 - optimizer.beta1)
        square.mul_(optimizer.beta2).addcmul_(gradient, gradient, value=1 - optimizer.beta2)
        power1, power2 = self._powers[0] * optimizer.beta1, self._powers[1] * optimizer.beta2
        self._powers = (power1, power2)
        # sqrt(square / (1 - power2)) + epsilon, in one scratch vector
        scale = torch.sqrt(square, out=self._room()).div_(math.sqrt(1 - power2)).add_(optimizer.epsilon)
        theta.addcdiv_(mean, scale, value=-optimizer.learning_rate / (1 - power1))

    def _room(self) -> torch.Tensor:
        if self._scratch.numel() != self._size:
            self._scratch = torch.empty(self._size, device=self._device)
        return self._scratch
