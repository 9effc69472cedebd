"""Control variates of clients, as SCAFFOLD keeps them: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled
Averaging for Federated Learning", Algorithm 1 with option II.

Client i keeps c_i, the server c. A local step follows g + d with the correction d = c - c_i, and after K steps of the
learning rate eta, which have moved the model by `update`,

    c_i+ = c_i - c - update / (K eta) = -d - update / (K eta),

the mean of the gradients on the way. The server finds the mean of c_i+ - c_i = -c - update / (K eta) in the mean of the
updates, so that a client sends nothing beside its update, where the paper's sends twice as much. All of them are
float32[n], of the model's trainable elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedge.run import Work
from fedge.vector import Array


def unsuited(work: Work) -> str:
    """Why a client's work is none that has control variates; empty if it is."""
    if work.steps is None:
        return "control variates need the same number of local steps at each site: set work.steps"
    if work.optimizer != "sgd":
        return f"control variates are for local steps of plain SGD: expected work.optimizer sgd, found {work.optimizer}"
    if work.personal:
        return "control variates are of models that are shared as a whole: leave out work.personal"
    return ""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a coordinator has committed: all up to round `kept` cannot be lost, and `counted` is the round and attempt
    by which a client's latest update has come into the model and the server's variate, if one has."""

    kept: int = 0
    counted: tuple[int, int] | None = None


def correct(variate: Array, own: Array | None) -> None:
    """c, float32[n], becomes d = c - c_i in place. Who has no c_i yet has zeros."""
    if own is not None:
        variate -= own


def renewed(correction: Array, update: Array, work: Work, *, bound: float | None = None) -> Array:
    """c_i+ of a client whose d, float32[n], and update, float32[n or more], these are; of the update's elements at most
    `bound` is in the sum.

    Raises:
        ValueError: the work is `unsuited`.
    """
    if why := unsuited(work):
        raise ValueError(why)
    assert work.steps is not None  # just checked
    scale = np.float32(-1 / (work.steps * work.learning_rate))
    update = update[: len(correction)]
    found: Array = (update if bound is None else np.clip(update, -bound, bound)) * scale
    found -= correction
    return found
