"""Global randomness, lent to user code: every generator it may reach is seeded, then given back.

For training only; nothing here is fit for keys, masks or noise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from fedge.errors import RefusedError
from fedge.privacy.secure import SecureSource
from fedge.refusal import Refusal, RefusalCode

_SECRET_WORDS: Final = 8
_STATE_WORDS: Final = 624
_STATE_AT: Final = 24
"""Where the words of the Mersenne Twister lie in the bytes of a state of torch's CPU generator, 64 bits each."""


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
        with self._lent():
            # Not torch.manual_seed, which visits every accelerator, nor numpy's get_state, which copies
            # word by word: this runs once per simulated client.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed((seed >> 31) & 0xFFFFFFFF)  # other bits than torch uses, so the streams differ
            yield

    @contextmanager
    def drawn(self, source: SecureSource) -> Iterator[None]:
        """Within the block the global generators start where nobody can know: for work on private examples.

        Of a known seed it is known which units a dropout leaves out for an example that comes first, and that
        all others have the next ones: then one example changes every gradient, and no clip bounds that.

        Raises:
            RefusedError: PROTECTION_UNAVAILABLE; torch's generator cannot be set so.
        """
        secrets = secrets_of(source)
        state = _torch_state(secrets[0])
        with self._lent():
            torch.default_generator.set_state(state)
            random.seed(int.from_bytes(secrets[1].tobytes(), "little"))
            np.random.seed(secrets[2])
            yield

    @contextmanager
    def _lent(self) -> Iterator[None]:
        kept_torch, kept_python = torch.default_generator.get_state(), random.getstate()
        kept_numpy = get_bit_generator()
        try:
            set_bit_generator(self._numpy)
            yield
        finally:
            torch.default_generator.set_state(kept_torch)
            random.setstate(kept_python)
            set_bit_generator(kept_numpy)


def secrets_of(source: SecureSource) -> list[np.ndarray[tuple[int], np.dtype[np.uint32]]]:
    """What generators start from, which is the first that is drawn for a piece of private work."""
    return [source.uint32(_SECRET_WORDS) for _ in range(3)]


def _torch_state(secret: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> torch.Tensor:
    """A state of torch's CPU generator from all of `secret` (uint32[n]): its own seeds have 32 bits."""
    state = _fresh_state().clone()
    _words(state)[:] = np.random.RandomState(secret).get_state(legacy=False)["state"]["key"]
    return state


@cache
def _fresh_state() -> torch.Tensor:
    """A state that has not drawn yet, after a look at whether its words lie where they are expected."""
    generator = torch.Generator()
    generator.manual_seed(_SECRET_WORDS)
    state = generator.get_state()
    expected = np.random.RandomState(_SECRET_WORDS).get_state(legacy=False)["state"]["key"]
    if state.nbytes < _STATE_AT + 8 * _STATE_WORDS or not np.array_equal(_words(state), expected):
        raise RefusedError(
            Refusal(
                RefusalCode.PROTECTION_UNAVAILABLE,
                "this version of torch keeps its random numbers in a way that fedge does not know",
            )
        )
    return state


def _words(state: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return state.numpy()[_STATE_AT : _STATE_AT + 8 * _STATE_WORDS].view(np.uint64)
