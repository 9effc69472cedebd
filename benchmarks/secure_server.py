"""S4 and S6: what a coordinator does with a cohort's masked vectors, from the first that arrives to the mean.

    python -m benchmarks.secure_server FILE --drop 10 [--cores N]

FILE is a cohort's session. Prints {"seconds": ..., ...}: the whole, and its parts. `before_seconds`, keys and shares
until all can mask, is not in the whole: sites train meanwhile. What comes out is compared with the plain mean.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.floors.secure import only_cores
from benchmarks.secure_session import Session
from benchmarks.session_file import load


def measured(session: Session, drop: int) -> dict[str, float]:
    """Seconds of each part.

    Raises:
        AssertionError: the sum is wrong.
    """
    ending = session.endings[drop]
    marks = [time.perf_counter()]
    coordinator = session.until_masked()
    marks.append(time.perf_counter())
    for name in ending.survivors:
        coordinator.add(name, *session.inputs[name])
    coordinator.survive(ending.survivors)
    marks.append(time.perf_counter())
    for name, signature in ending.consents.items():
        coordinator.consented(name, signature)
    marks.append(time.perf_counter())
    for name, reveal in ending.reveals.items():
        coordinator.disclose(name)
        coordinator.revealed(name, reveal)
    marks.append(time.perf_counter())
    mean = coordinator.unmask(ending.survivors)
    marks.append(time.perf_counter())
    assert np.array_equal(mean.vector, ending.mean), "the secure sum differs from the plain one"
    parts = ("before", "add", "consent", "reveal", "unmask")
    found = {
        f"{part}_seconds": end - begin for part, begin, end in zip(parts, marks, marks[1:], strict=False)
    }
    return {"seconds": marks[-1] - marks[1], **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--drop", type=int, default=0)
    parser.add_argument("--cores", type=int, default=1)
    given = parser.parse_args()
    only_cores(given.cores)
    print(json.dumps(measured(load(given.file), given.drop)))


if __name__ == "__main__":
    main()
