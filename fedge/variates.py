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

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np

from fedge.run import Work
from fedge.vector import Array

MOST_ATTEMPTS: Final = 1000
"""That an order tells of, the latest."""


def unsuited(work: Work) -> str:
    """Why a client's work is none that has control variates; empty if it is."""
    if work.steps is None:
        return "control variates need the same number of local steps at each site: set work.steps"
    if work.optimizer != "sgd":
        return f"control variates are for local steps of plain SGD: expected work.optimizer sgd, found {work.optimizer}"
    return ""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a coordinator has committed: up to round `kept` so that it cannot be lost, and by which `attempts` where
    that was not the first (0: by none, the round was skipped)."""

    kept: int = 0
    attempts: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))

    def counts(self, round: int, attempt: int) -> bool:
        """Whether what was made for this attempt at an earlier round is in the model, and in the server's variate."""
        return self.attempts.get(round, 1) == attempt


def correct(variate: Array, own: Array | None) -> None:
    """c, float32[n], becomes d = c - c_i in place. Who has no c_i yet has zeros."""
    if own is not None:
        variate -= own


def renewed(correction: Array, update: Array, work: Work) -> Array:
    """c_i+ of a client whose d, float32[n], and update, float32[n or more], these are.

    Raises:
        ValueError: the work is `unsuited`.
    """
    if why := unsuited(work):
        raise ValueError(why)
    assert work.steps is not None  # just checked
    found: Array = update[: len(correction)] * np.float32(-1 / (work.steps * work.learning_rate))
    found -= correction
    return found
