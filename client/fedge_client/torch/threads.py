"""How many threads torch may use for one model: a rule, so that the same run gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_MODEL = 200_000
"""Parameters below which a second thread costs more than it helps: its hand-over outlasts the work, and
beside any other load it waits by spinning (measured at a tenth of the speed on two busy cores)."""


def suitable_threads(parameters: int) -> int:
    """One for a small model, as many as torch finds cores for a large one."""
    return 1 if parameters < SMALL_MODEL else torch.get_num_threads()


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
