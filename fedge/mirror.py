"""How a mirror moves: the one function that coordinator and clients must compute to the same bits."""

from __future__ import annotations

import numpy as np

from fedge.optimizer import Optimizer, Slots, apply
from fedge.vector import Array


def advance(
    optimizer: Optimizer, model: Array, slots: Slots, gradient: Array, *, trainable: int
) -> tuple[Array, Slots]:
    """`(model, slots), gradient -> (model, slots)`; inputs are left as they were.

    The head `[:trainable]` moves by the optimiser; in the tail, which has no gradient, `gradient` holds
    the mean change of the floating-point buffers, and is added.
    """
    moved: Array = np.empty_like(model)
    moved[:trainable], slots = apply(optimizer, model[:trainable], slots, gradient[:trainable])
    np.add(model[trainable:], gradient[trainable:], out=moved[trainable:])
    return moved, slots
