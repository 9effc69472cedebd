"""Personal layers around a trainer, which knows the whole model alone (`fedge.personal`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from fedge.errors import RefusedError
from fedge.personal import Split
from fedge.refusal import Refusal, RefusalCode
from fedge.task import Task
from fedge.vector import Array, Layout, all_finite
from fedge_client.local import Outcome
from fedge_client.torch.framework import framework


def check_learned(own: Array) -> None:
    """
    Raises:
        RefusedError: NOT_FINITE; personal layers are NaN or infinite somewhere.
    """
    if not all_finite(own):
        why = "training made personal layers with NaN or infinity: lower the learning rate"
        raise RefusedError(Refusal(RefusalCode.NOT_FINITE, why))


class OwnLayers:
    """Those of a task's model that match `patterns`.

    Raises:
        LayoutError: they cannot be; see `Split.of`.
    """

    def __init__(self, task: Task, whole: Layout, patterns: Sequence[str], *, seed: int) -> None:
        self._task, self._seed = task, seed
        self.split = Split.of(whole, patterns)

    @cached_property
    def first(self) -> Array:
        """What everybody's are before the first round, float32[personal.size]: those of the run's initial model."""
        return self.split.personal_of(framework.initial_model(self._task, seed=self._seed).vector)

    def train(
        self, work: Callable[[Array, Array], Outcome], model: Array, own: Array, *, out: Array
    ) -> Outcome:
        """Have `work` train the whole model to an update, float32[whole.size] each: what the shared part of it has
        moved by goes to `out` (float32[shared.size]), and `own` (float32[personal.size]) becomes what it has learned.

        Raises:
            RefusedError: NOT_FINITE; that is NaN or infinite somewhere.
        """
        whole, moved = self.split.join(model, own), np.empty(self.split.whole.size, np.float32)
        outcome = work(whole, moved)
        self.split.shared_of(moved, out=out)
        own += self.split.personal_of(moved)
        check_learned(own)
        return outcome
