"""How far a client's work on an order is, in thousandths: to fetch the model, to compute, and to deliver.

Deadlines are about this (see `fedge.round`). The coordinator sees the first and the last part itself; of the
middle one the client tells.
"""

from __future__ import annotations

from typing import Final

ALL: Final = 1000
_FETCHED: Final = 250
_COMPUTED: Final = 750


def fetched(done: int, total: int) -> int:
    """So many of the model's bytes are on their way."""
    return max(1, _between(0, _FETCHED, done, total))


def computed(done: int, total: int) -> int:
    """So many of the steps are done."""
    return _between(_FETCHED, _COMPUTED, done, total)


def delivered(done: int, total: int) -> int:
    """So many of the update's bytes have arrived."""
    return _between(_COMPUTED, ALL, done, total)


def every_s(deadline_s: float) -> float:
    """How often progress is worth telling: several times within a deadline."""
    return min(30.0, max(0.5, deadline_s / 8))


def _between(begin: int, end: int, done: int, total: int) -> int:
    return begin + (end - begin) * min(done, total) // max(1, total)
