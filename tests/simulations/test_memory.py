"""Memory that was freed is there for the next step, and not cleared again page by page."""

from __future__ import annotations

import subprocess
import sys

import pytest

_STEPS = """
import resource
import sys
import numpy as np
from fedge_sim.memory import keep_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    for _ in range(3):
        large, larger = np.ones(1_500_000, np.float32), np.ones(3_000_000, np.float32)

if "kept" in sys.argv:
    keep_freed()
step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


def faults(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _STEPS, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what glibc does is known only there")
def test_steps_of_the_same_sizes_ask_the_system_for_no_more_memory():
    """Of 20 steps each has some 13,000 pages of 4 kB, or as many larger ones as the system makes of them."""
    assert faults("kept") < 100


def test_where_there_is_no_such_library_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    from fedge_sim import memory

    class Other:
        """A C library without mallopt."""

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Other())
    memory.keep_freed()
    monkeypatch.setattr(memory.sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    memory.keep_freed()
