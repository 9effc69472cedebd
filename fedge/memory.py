"""Keeps the allocator from holding on to memory that imports and large messages have left behind.

glibc only: other C libraries have neither these calls nor the heaps that make them needed.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of glibc's malloc.h."""


def use_one_arena() -> None:
    """Call before threads start: glibc then keeps one heap, and not one for each of gRPC's threads.

    What is freed on one thread serves the next; with many heaps a coordinator of large models keeps a
    model's size and more in fragments.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)


def keep_freed() -> None:
    """Have what is freed serve the next allocation, large ones too, until `give_back_freed`.

    Else each array of some 100 MB is new pages, which the system has to clear: for those who make many of them that is
    most of what they cost.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed() -> None:
    """Return what is free inside the heap to the machine: a moment's work, for moments of rest."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
