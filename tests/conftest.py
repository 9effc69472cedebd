"""What every test has: one torch thread, no deadlines, and the helpers in tests/support."""

from __future__ import annotations

import os

from hypothesis import settings

# Tiny models gain nothing from threads, and wait long for them on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Time is measured in benchmarks/, never asserted in tests.
settings.register_profile("fedge", deadline=None)
settings.load_profile("fedge")
