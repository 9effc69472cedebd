"""Shares cover the work once, and an exception in one reaches the caller."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import parallel
from fedge.parallel import in_shares


@given(blocks=st.integers(0, 50), elements=st.integers(0, 50 * parallel.ELEMENTS))
def test_shares_make_up_the_whole_in_order(blocks, elements):
    seen: list[int] = []
    lock = threading.Lock()

    def note(share: range) -> None:
        with lock:
            seen.extend(share)

    shares = in_shares(note, blocks=blocks, elements=elements)
    assert [number for share in shares for number in share] == list(range(blocks)) == sorted(seen)


def test_small_work_is_done_on_the_callers_thread():
    threads = []
    in_shares(lambda share: threads.append(threading.current_thread()), blocks=9, elements=parallel.ELEMENTS)
    assert threads == [threading.current_thread()]


def test_an_exception_in_one_share_is_raised_when_all_have_ended(monkeypatch):
    monkeypatch.setattr(parallel, "processors", lambda: 3)
    ended = []

    def work(share: range) -> None:
        ended.append(share)
        if 0 in share:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        in_shares(work, blocks=9, elements=9 * parallel.ELEMENTS)
    assert len(ended) == 3
