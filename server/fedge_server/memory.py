"""Keeps the allocator from holding on to memory that large messages have left behind."""

from __future__ import annotations

import ctypes

_ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""


def use_one_arena() -> None:
    """Call before threads start: glibc then keeps one heap, and not one for each of gRPC's threads.

    What is freed on one thread serves the next; with many heaps a coordinator of large models keeps a
    model's size and more in fragments. Other C libraries have no such heaps and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
