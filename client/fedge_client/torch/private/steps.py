"""DP-SGD's noisy gradients: a Poisson sample, clipped sums in passes of bounded memory, and noise.

Abadi et al. 2016, Algorithm 1, with the denominator of the expected batch. The sample's own size shows in
nothing that is released: a step without any example is a step of noise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from fedge.privacy.example import ExampleLevel, Schedule
from fedge.privacy.secure import SecureSource
from fedge.vector import Array
from fedge_client.torch.batches import Batches
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.private.admission import refuse
from fedge_client.torch.private.clipping import Clipping

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Private:
    """What one order's work does for privacy: how much noise, and where it comes from.

    `source` serves this order alone; it is a device's own entropy, or in a simulation the run's seed.
    """

    level: ExampleLevel
    source: SecureSource

    def sample(self, size: int, schedule: Schedule) -> torch.Tensor:
        """A new Poisson sample of 0..size-1, int64[n], ascending."""
        return torch.from_numpy(self.source.poisson_sample(size, schedule.sampling_rate))

    def add_noise(self, gradients: torch.Tensor, schedule: Schedule) -> None:
        """Make the sum of a sample's clipped gradients (float32[n]) their noised mean, in place."""
        self.source.add_gaussian(gradients.numpy(), self.level.noise_multiplier * self.level.clip)
        gradients.mul_(1 / schedule.expected_batch)


def noisy_gradient(
    flat: FlatModule, batches: Batches, clipped: Clipping, schedule: Schedule, private: Private
) -> None:
    """Leave in `flat.gradient` the noised mean gradient of a new Poisson sample at the loaded model.

    **Guarantees.** One example more or less changes the sum before the noise by at most `clip` in L2 norm;
    the noise has the standard deviation `noise_multiplier * clip` in every coordinate.

    An example that cannot be read, or on which the model or the loss fails, adds nothing: that work fails for
    one example would tell that it is there.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE; the model did something that its examples did not show before.
    """
    level = private.level
    flat.zero_gradient()
    before = flat.head.clone()
    sample = private.sample(batches.size, schedule)
    if len(sample):
        _add(flat, batches, sample, clipped, level.clip)
    if flat.was_rearranged() or not torch.equal(flat.head.view(torch.int32), before.view(torch.int32)):
        refuse("the model or the loss changes parameters while it computes, and what it changes has no noise")
    private.add_noise(flat.gradient, schedule)


def _add(flat: FlatModule, batches: Batches, sample: torch.Tensor, clipped: Clipping, clip: float) -> None:
    """Add the clipped gradients of the examples at `sample` (int64[n]), each by itself if in passes they fail.

    Buffers are put back after each pass, so that nothing of one gets into the next but by what has noise.
    """
    buffers = flat.buffers()
    try:
        for rows in torch.split(sample, clipped.max_rows):
            clipped.together.add(*batches.gather(rows), clip)
            flat.put_back(buffers)
    except Exception as together:  # whatever it is, it must not be told
        flat.zero_gradient()  # of the pass that failed a part may have been added
        failed = 0
        for row in torch.split(sample, 1):
            flat.put_back(buffers)
            try:
                clipped.alone.add(*batches.gather(row), clip)
            except Exception:  # noqa: BLE001  # as above
                failed += 1
        flat.put_back(buffers)
        log.warning("private_batch_failed examples=%d left_out=%d", len(sample), failed, exc_info=together)


def check_unchanged(tail: Array) -> None:
    """Refuse an update that changes what has no noise: buffers and frozen parameters (float32[n] of changes).

    Raises:
        RefusedError: MODEL_NOT_PRIVATE.
    """
    if tail.any():
        refuse(
            "training changes a buffer or a frozen parameter, to which no noise is added: keep them constant"
        )
