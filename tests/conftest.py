"""What every test has: one torch thread, no deadlines, and the helpers in tests/support."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Tiny models gain nothing from threads, and wait long for them on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Time is measured in benchmarks/, never asserted in tests.
settings.register_profile("fedge", deadline=None)
settings.load_profile("fedge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the system come first: they wait for real processes, while other workers of xdist compute."""
    items.sort(key=lambda item: "tests/system/" not in item.nodeid)
