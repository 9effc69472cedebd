"""Work on large vectors in shares, each on a thread of its own, as a BLAS would.

The one place of the core that knows threads. What is done in parallel writes to disjoint memory and
does not depend on how it is shared, so the steps that use it stay functions of their arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

ELEMENTS = 1 << 20
"""A thread is worth starting for so many elements."""


def in_shares(function: Callable[[range], None], *, blocks: int, elements: int) -> list[range]:
    """Call `function` with ranges that make up `range(blocks)`; returns the ranges.

    `elements` is the size of the whole work. An exception of one share is raised when all have ended.
    """
    count = max(1, min(processors(), elements // ELEMENTS, blocks))
    shares = [range(*cut) for cut in pairwise(blocks * number // count for number in range(count + 1))]
    if count == 1:
        function(shares[0])
        return shares
    with ThreadPoolExecutor(count, thread_name_prefix="fedge-shares") as pool:
        for done in [pool.submit(function, share) for share in shares]:
            done.result()
    return shares


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
