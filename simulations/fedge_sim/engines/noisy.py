"""Members of a stack who protect their examples: samples, clipped sums and noise, as each does by itself in the loop.

Sample and noise are the very ones of the loop, since they follow from a source of each member's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import torch

from fedge.privacy.example import Schedule
from fedge.run import Work
from fedge_client.local import Outcome
from fedge_client.torch.private.clipping import PHYSICAL_ROWS
from fedge_client.torch.private.steps import Private
from fedge_client.torch.seeded import secrets_of
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.model import Slopes, StackedModel
from fedge_sim.engines.pool import Gathered, Part

Kind = Literal["train", "gradient"]

_FOURS: Final = 4
"""A pass has a multiple of so many rows, so that few sizes are traced."""


def all_private(parts: Sequence[Part]) -> bool:
    """Whether members protect their examples, as all do or none."""
    return parts[0].private is not None


def most_at_once(model: StackedModel, parts: Sequence[Part], work: Work) -> int:
    """Members for whom there is room: with privacy, for the gradient of each of their examples.

    Raises:
        UnsuitedError: for nobody.
    """
    if not all_private(parts):
        return model.most
    rows = _rows_of(parts, work)
    most = model.max_bytes // (4 * model.size * rows)
    if not most:
        raise UnsuitedError(f"the gradients of {rows} examples are more than {model.max_bytes >> 20} MiB")
    return min(most, model.most)


def private_outcomes(parts: Sequence[Part], work: Work, kind: Kind) -> list[Outcome]:
    """What they tell, which is nothing but what was done."""
    return [
        Outcome(1, {}, Schedule.of(work, part.batches.size, kind).mechanism(_of(part).level.noise_multiplier))
        for part in parts
    ]


class Noisy:
    """`fedge_sim.engines.stack.Gradients`: noised means of Poisson samples, as `noisy_gradient` makes each."""

    def __init__(self, model: StackedModel, work: Work, parts: Sequence[Part], kind: Kind) -> None:
        self._model, self._parts = model, parts
        self._schedules = [Schedule.of(work, part.batches.size, kind) for part in parts]
        self._rows = _rows_of(parts, work)
        count = model.size_for(len(parts))
        self._gathered = Gathered(parts, count, model.shelf.device, self._rows)
        self._sums = torch.zeros(count, model.size, device=model.shelf.device)
        for part in parts:
            secrets_of(_of(part).source)  # the model draws nothing from them, and the rest is as in the loop

    def at(self, step: int, parameters: list[torch.Tensor], active: int) -> Slopes:
        members = [
            (part, _of(part), schedule)
            for part, schedule in zip(self._parts[:active], self._schedules, strict=False)
        ]
        samples = [private.sample(part.batches.size, schedule) for part, private, schedule in members]
        clients = len(parameters[0])
        rooms = self._model.views(self._sums[:clients])
        self._sums.zero_()
        for start in range(0, max(map(len, samples)), self._rows):
            some = [sample[start : start + self._rows] for sample in samples]
            batch = self._gathered.place(some, clients)
            clipped = self._model.clipped(parameters, batch, members[0][1].level.clip)
            for room, each in zip(rooms, clipped, strict=True):
                room += each
        sums = self._sums[:active].cpu()  # itself, if it is there
        for row, (_, private, schedule) in zip(sums, members, strict=True):
            private.add_noise(row, schedule)
        if sums.device != self._sums.device:
            self._sums[:active] = sums
        return rooms, self._sums.new_zeros(active)


def _rows_of(parts: Sequence[Part], work: Work) -> int:
    """Examples of a member that go through the model in one pass: mostly a sample is one."""
    largest = max(part.batches.size for part in parts)
    expected = max(Schedule.of(work, part.batches.size, "gradient").expected_batch for part in parts)
    rows = min(math.ceil(expected + 2 * math.sqrt(expected)), largest, PHYSICAL_ROWS)
    return -(-rows // _FOURS) * _FOURS


def _of(part: Part) -> Private:
    assert part.private is not None  # there is a `Noisy` only of such
    return part.private
