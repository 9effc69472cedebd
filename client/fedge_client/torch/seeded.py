"""Global randomness, lent to user code: every generator it may reach is seeded, then given back.

For training only; nothing here is fit for keys, masks or noise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator


class GlobalRandomness:
    """Seeds torch's CPU generator, numpy's legacy one and `random` for the length of a block."""

    def __init__(self) -> None:
        self._numpy = np.random.MT19937(0)  # lent to numpy: seeding one is cheap, making one is not

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Within the block the global generators start from `seed` (63 bits).

        Afterwards they go on from where they were, also after an exception (but for one value: numpy's
        legacy `normal` draws pairs, and the unused half of a pair is dropped).
        """
        kept_torch, kept_python = torch.default_generator.get_state(), random.getstate()
        kept_numpy = get_bit_generator()
        try:
            # Not torch.manual_seed, which visits every accelerator, nor numpy's get_state, which copies
            # word by word: this runs once per simulated client.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            set_bit_generator(self._numpy)
            np.random.seed((seed >> 31) & 0xFFFFFFFF)  # other bits than torch uses, so the streams differ
            yield
        finally:
            torch.default_generator.set_state(kept_torch)
            random.setstate(kept_python)
            set_bit_generator(kept_numpy)
