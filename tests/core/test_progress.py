"""Progress in thousandths: it grows with the work, and its parts follow each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedge import progress

counts = st.integers(0, 2**50)


@given(counts, counts, st.integers(0, 2**50))
def test_more_work_is_never_less_progress_and_each_part_ends_where_the_next_begins(done, more, total):
    for part in (progress.fetched, progress.computed, progress.delivered):
        assert part(done, total) <= part(done + more, total) <= part(total, total)
    assert 1 <= progress.fetched(done, total) <= progress.computed(0, total)
    assert progress.computed(done, max(1, total)) <= progress.delivered(0, total)
    assert progress.delivered(done, total) <= progress.ALL


def test_all_of_it_is_a_thousand():
    assert progress.delivered(7, 7) == progress.ALL


def test_it_is_told_several_times_within_a_deadline_but_not_for_each_step():
    assert [progress.every_s(deadline_s) for deadline_s in (0.1, 8, 80, 1e9)] == [0.5, 1.0, 10.0, 30.0]
