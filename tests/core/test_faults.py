"""A fault strikes at its point, at its time, and nowhere else."""

from __future__ import annotations

import multiprocessing
import signal

import pytest

from fedge.errors import ConfigError
from fedge.faults import POINTS, Faults


def test_without_the_variable_nothing_ever_happens() -> None:
    faults = Faults.of({})
    assert faults.armed == ""
    for point in POINTS:
        faults.reach(point)


def test_a_full_disk_lasts_as_long_as_it_is_said_to() -> None:
    faults = Faults.of({"FEDGE_FAULT": "store.commit:2:fail:3"})
    struck = []
    for number in range(1, 8):
        faults.reach("store.before")
        if number in (2, 3, 4):
            with pytest.raises(OSError, match="No space left on device"):
                faults.reach("store.commit")
            struck.append(number)
        else:
            faults.reach("store.commit")
    assert struck == [2, 3, 4]


def test_a_full_disk_without_an_end_has_none() -> None:
    faults = Faults.of({"FEDGE_FAULT": "store.commit:1:fail"})
    for _ in range(5):
        with pytest.raises(OSError):
            faults.reach("store.commit")


def _live_through(times: int) -> None:
    faults = Faults.of({"FEDGE_FAULT": "store.after:3"})
    for _ in range(times):
        faults.reach("store.after")


@pytest.mark.parametrize(("times", "code"), [(2, 0), (3, -signal.SIGKILL)])
def test_a_process_is_killed_at_its_point_and_not_before(times: int, code: int) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_live_through, args=(times,))
    process.start()
    process.join(60)
    assert process.exitcode == code


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("store.comit", "'store.comit'; .*store.commit"),
        ("store.commit:x", "expected POINT"),
        ("store.commit:1:explode", "expected POINT"),
        ("store.commit:1:fail:1:1", "expected POINT"),
    ],
)
def test_a_fault_that_is_none_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Faults.of({"FEDGE_FAULT": text})
