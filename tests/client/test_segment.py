"""Shared memory by descriptor: what one process writes the other reads, and nothing has a name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from fedge_client.segment import Segment


@pytest.fixture(params=["memfd", "file"])
def segment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Segment]:
    if request.param == "file":  # where the system has no memfd
        monkeypatch.delattr(os, "memfd_create", raising=False)
    made = Segment.create()
    yield made
    made.close()


def other_end(segment: Segment) -> Segment:
    """The same segment as another process holds it: by a descriptor of its own."""
    return Segment(os.dup(segment.descriptor))


def test_what_one_side_writes_the_other_reads(segment: Segment):
    ours = segment.vector(5, grow=True)
    np.testing.assert_array_equal(ours, np.zeros(5, np.float32))
    ours[:] = range(5)
    other = other_end(segment)
    theirs = other.vector(5)
    assert theirs.dtype == np.float32
    np.testing.assert_array_equal(theirs, range(5))
    theirs[2] = 9
    assert ours[2] == 9
    other.close()


def test_a_child_process_that_is_given_the_descriptor_shares_it(segment: Segment):
    vector = segment.vector(3, grow=True)
    vector[:] = [1, 2, 3]
    script = (
        "import sys; from fedge_client.segment import Segment\n"
        "vector = Segment(int(sys.argv[1])).vector(3)\n"
        "vector *= 2\n"
    )
    command = [sys.executable, "-c", script, str(segment.descriptor)]
    subprocess.run(command, check=True, pass_fds=[segment.descriptor], timeout=60)
    np.testing.assert_array_equal(vector, [2, 4, 6])


def test_a_child_that_is_not_given_the_descriptor_does_not_have_it(segment: Segment):
    assert not os.get_inheritable(segment.descriptor)


def test_it_grows_and_shrinks_with_the_run_that_has_it(segment: Segment):
    segment.vector(4, grow=True)[:] = 7
    assert len(segment.vector(1000, grow=True)) == 1000
    np.testing.assert_array_equal(segment.vector(4, grow=True), np.full(4, 7))
    assert os.fstat(segment.descriptor).st_size == 16
    assert len(segment.vector(0, grow=True)) == 0
    np.testing.assert_array_equal(segment.vector(4, grow=True), np.zeros(4), "what was cut off is gone")


def test_the_side_that_may_not_grow_it_is_refused_room_that_is_not_there(segment: Segment):
    segment.vector(4, grow=True)
    other = other_end(segment)
    with pytest.raises(ValueError, match="mmap length"):
        other.vector(5)
    other.close()
    assert os.fstat(segment.descriptor).st_size == 16


def test_asked_twice_it_is_the_same_memory_and_not_mapped_again(segment: Segment):
    assert segment.vector(4, grow=True) is segment.vector(4, grow=True)


def test_an_array_outlives_the_segments_close(segment: Segment):
    other = other_end(segment)
    vector = other.vector(4, grow=True)
    other.close()
    vector[:] = 3
    np.testing.assert_array_equal(vector, np.full(4, 3))
