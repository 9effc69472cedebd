"""What somebody else's code prints is not the output of a command."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def output_apart() -> Iterator[None]:
    """What a task's or an app's code prints, or its libraries or a cluster, goes to the standard error."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        # What is still in somebody's buffer would come later.
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
        ctypes.CDLL(None).fflush(None)
        os.dup2(output, 1)
        os.close(output)
