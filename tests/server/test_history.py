"""A run's history: rows, when they last changed, and whoever waits for news of them."""

from __future__ import annotations

import asyncio

import pytest

from fedge.history import Row
from fedge_server.history import History


def row(round: int, **metrics: float) -> Row:
    return Row(round, 1, ("a", "b"), 10, 0.5, 100, 200, 0, metrics=metrics)


def test_rows_are_told_once_and_again_when_they_change():
    history = History()
    history.put(row(1, train_loss=2.0))
    history.put(row(2))
    assert [each.round for each in history.since(-1)] == [1, 2]
    seen = history.revision
    assert history.since(seen) == []
    history.put(history.evaluated(1, {"loss": 1.0}))
    assert [each.round for each in history.since(seen)] == [1]
    assert history.rows[0].metrics == {"train_loss": 2.0, "loss": 1.0}
    assert history.rows[1] == row(2)


def test_a_change_of_state_alone_is_news_without_rows():
    history = History()
    history.put(row(1))
    seen = history.revision
    history.touch()
    assert history.revision > seen
    assert history.since(seen) == []


def test_metrics_of_a_round_that_was_never_committed_are_a_defect():
    with pytest.raises(IndexError):
        History().evaluated(1, {"loss": 1.0})


def test_everybody_who_waits_is_woken_by_the_next_change_and_misses_none():
    async def scenario() -> None:
        history = History()
        watchers = [asyncio.create_task(history.changed_after(0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(watcher.done() for watcher in watchers)
        history.put(row(1))
        history.put(row(2))
        assert await asyncio.gather(*watchers) == [2, 2, 2]
        assert await history.changed_after(1) == 2, "what was missed is told at once"
        late = asyncio.create_task(history.changed_after(2))
        await asyncio.sleep(0)
        assert not late.done()
        history.touch()
        assert await late == 3

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_row_in_plain_values_is_all_of_it():
    assert row(3, loss=0.5).as_dict() == {
        "round": 3,
        "attempt": 1,
        "clients": ["a", "b"],
        "num_examples": 10,
        "seconds": 0.5,
        "bytes_down": 100,
        "bytes_up": 200,
        "refused": 0,
        "staleness": 0,
        "metrics": {"loss": 0.5},
    }


def test_rows_of_an_earlier_process_are_told_to_those_who_know_nothing_yet():
    history = History([row(1), row(2)])
    history.put(history.evaluated(2, {"loss": 1.0}))
    assert [each.round for each in history.since(-1)] == [1, 2]
    assert [each.round for each in history.since(0)] == [2]
