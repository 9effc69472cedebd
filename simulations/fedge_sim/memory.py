"""What a process does with memory that was freed: a step's tensors are as large as the last one's."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_TRIM_THRESHOLD: Final = -1  # of mallopt(3)
_MMAP_THRESHOLD: Final = -3

KEPT_BYTES: Final = 1 << 28
_LARGEST_KEPT_BYTES: Final = 1 << 25
"""As much as glibc allows. What is larger is mapped for itself, and given back."""


def keep_freed() -> None:
    """Have glibc keep up to KEPT_BYTES that were freed for what is allocated next.

    It would give memory back to the system, which then has to clear it again page by page for the next step: up to a
    third of the time of a round of small models, by chance of how memory was laid out. Elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library may have none
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
