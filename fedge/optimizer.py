"""Optimisers as values with pure steps on flat vectors: what mirrors, servers and trainers agree on.

The arithmetic is elementwise and in float32 with array operators, so that every party that starts
from the same bits ends with the same bits; anything that is not elementwise (the bias correction of
Adam) is computed by repeated multiplication, never by a math library's `pow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedge.vector import Array

Kind = Literal["sgd", "momentum", "adam"]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`sgd`, `momentum` (Polyak's heavy ball) or `adam` (Kingma and Ba 2015, Algorithm 1).

    `momentum` is used by "momentum" alone; `beta1`, `beta2` and `epsilon` by "adam" alone.
    """

    kind: Kind = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    @property
    def slot_count(self) -> int:
        """Vectors of state, each as long as the parameters."""
        return {"sgd": 0, "momentum": 1, "adam": 2}[self.kind]


@dataclass(frozen=True, eq=False)
class Slots:
    """An optimiser's state: `vectors` float32[n] each, and the running powers of Adam's betas."""

    vectors: tuple[Array, ...]
    beta1_power: float = 1.0
    beta2_power: float = 1.0


def init_slots(optimizer: Optimizer, size: int) -> Slots:
    """The state before the first step: zeros."""
    return Slots(tuple(np.zeros(size, np.float32) for _ in range(optimizer.slot_count)))


def apply(optimizer: Optimizer, parameters: Array, slots: Slots, gradient: Array) -> tuple[Array, Slots]:
    """One step: `(parameters, slots), gradient -> (parameters, slots)`. Inputs are left as they were."""
    rate = np.float32(optimizer.learning_rate)
    if optimizer.kind == "sgd":
        return parameters - rate * gradient, slots
    if optimizer.kind == "momentum":
        velocity = np.float32(optimizer.momentum) * slots.vectors[0] + gradient
        return parameters - rate * velocity, Slots((velocity,))
    beta1, beta2 = np.float32(optimizer.beta1), np.float32(optimizer.beta2)
    # Rounded once: 1 - float32(0.999) would be off by 1e-5 of itself, and by far more for betas nearer 1.
    share1, share2 = np.float32(1 - optimizer.beta1), np.float32(1 - optimizer.beta2)
    mean: Array = beta1 * slots.vectors[0] + share1 * gradient
    square: Array = beta2 * slots.vectors[1] + share2 * (gradient * gradient)
    power1 = slots.beta1_power * optimizer.beta1
    power2 = slots.beta2_power * optimizer.beta2
    corrected = mean / np.float32(1 - power1)
    scale = np.sqrt(square / np.float32(1 - power2)) + np.float32(optimizer.epsilon)
    return parameters - rate * (corrected / scale), Slots((mean, square), power1, power2)
