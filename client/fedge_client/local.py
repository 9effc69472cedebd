"""A run's work at one site, whichever framework does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fedge.events import OrderId
from fedge.privacy.mechanism import Mechanism
from fedge.vector import Array, Layout

if TYPE_CHECKING:
    from fedge_client.torch.private.steps import Private

Progress = Callable[[int, int], None]
"""Called with (done, total) after every step or evaluation batch; it may raise to cancel."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a piece of local work gives beside its vector: the examples it used, and its metrics.

    Private work tells neither how many examples there were nor any metric of them without noise; `mechanism`
    is what was really done for privacy.
    """

    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    mechanism: Mechanism | None = None


class Local(Protocol):
    """Does the orders of one run."""

    @property
    def layout(self) -> Layout:
        """Of what is shared."""
        ...

    @property
    def first_layers(self) -> Array | None:
        """What the personal layers begin with, float32[personal.size]; None if there are none (`fedge.personal`)."""
        ...

    @property
    def examples(self) -> tuple[int, int]:
        """For training and for evaluation; 0 where that is not known."""
        ...

    def do(
        self,
        order: OrderId,
        *,
        seed: int,
        model: Array,
        out: Array,
        private: Private | None,
        progress: Progress,
        correction: Array | None = None,
        layers: Array | None = None,
    ) -> Outcome:
        """Train from a model, or evaluate it; the update goes to `out`. Both are float32[layout.size]. `correction` is
        added to each gradient of training: float32[layout.trainable_size]. `layers` are the personal ones, if there are
        any: training leaves there what they have learned."""
        ...
