"""Reductions that look at all updates: what they are, and what a minority of hostile ones can do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from fedge.errors import ConfigError
from fedge.pipeline import Mean, Reduction, Update
from fedge.robust import CoordinateMedian, TrimmedMean
from fedge.run import RunConfig
from fedge.secagg.terms import SumTerms
from fedge.vector import Layout, Tensor
from fedge_strategies import FedAvg

ROWS = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def combined(reduction: Reduction, rows: np.ndarray) -> np.ndarray:
    updates = [Update(str(at), row, 1 + 7 * at) for at, row in enumerate(rows)]
    half = len(updates) // 2
    state = reduction.fold(reduction.start(rows.shape[1]), *updates[:half])
    return reduction.finish(state, *updates[half:]).vector


@given(ROWS)
def test_the_median_is_numpys(rows: np.ndarray):
    with np.errstate(all="ignore"):
        expected = np.median(rows.astype(np.float64), axis=0).astype(np.float32)
    assert np.array_equal(combined(CoordinateMedian(), rows), expected)


@given(ROWS, st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.49]))
def test_the_trimmed_mean_is_scipys(rows: np.ndarray, trim: float):
    expected = stats.trim_mean(rows.astype(np.float64), trim + 1e-12, axis=0)
    scale = np.abs(rows.astype(np.float64)).max(initial=1e-30)
    assert np.abs(combined(TrimmedMean(trim), rows) - expected).max() <= 1e-6 * scale


@pytest.mark.parametrize(("count", "out"), [(9, 0), (10, 1), (30, 3), (29, 2)])
def test_a_tenth_is_left_out_at_each_end_and_no_more(count: int, out: int):
    rows = np.arange(count, dtype=np.float32)[:, None] ** 2
    expected = rows[out : count - out].mean()
    assert combined(TrimmedMean(0.1), rows)[0] == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 9), st.data())
def test_fewer_hostile_updates_than_half_move_the_median_no_further_than_an_honest_one(honest: int, data):
    hostile = data.draw(st.integers(0, honest - 1))
    own = data.draw(npst.arrays(np.float32, (honest, 3), elements=st.floats(-5, 5, width=32)))
    lies = data.draw(npst.arrays(np.float32, (hostile, 3), elements=st.sampled_from([-3e38, 3e38, 0.0, 7.0])))
    found = combined(CoordinateMedian(), np.concatenate([lies, own]))
    assert (own.min(0) <= found).all()
    assert (found <= own.max(0)).all()


@given(st.integers(2, 12), st.sampled_from([0.1, 0.25, 0.4]), st.data())
def test_as_many_hostile_updates_as_are_trimmed_move_the_mean_no_further_than_an_honest_one(
    count, trim, data
):
    hostile = int(trim * count)
    own = data.draw(npst.arrays(np.float32, (count - hostile, 3), elements=st.floats(-5, 5, width=32)))
    lies = data.draw(npst.arrays(np.float32, (hostile, 3), elements=st.sampled_from([-3e38, 3e38, 9.0])))
    found = combined(TrimmedMean(trim), np.concatenate([lies, own]))
    assert (own.min(0) - 1e-6 <= found).all()
    assert (found <= own.max(0) + 1e-6).all()


def test_one_hostile_update_takes_the_mean_along_and_neither_of_these():
    rows = np.array([[1.0], [2.0], [3.0], [1e30]], np.float32)
    assert combined(Mean("uniform"), rows)[0] > 1e29
    assert combined(CoordinateMedian(), rows)[0] == 2.5
    assert combined(TrimmedMean(0.25), rows)[0] == 2.5


def test_long_vectors_are_combined_block_by_block():
    rows = np.random.default_rng(0).standard_normal((3, 800_000)).astype(np.float32)
    assert np.array_equal(combined(CoordinateMedian(), rows), np.median(rows, axis=0))


@pytest.mark.parametrize("trim", [-0.1, 0.5, math.nan, math.inf])
def test_no_more_can_be_trimmed_than_there_is(trim: float):
    with pytest.raises(ValueError, match="below one half"):
        TrimmedMean(trim)


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_there_is_none_of_this_where_updates_cannot_be_looked_at(aggregation):
    run = RunConfig.from_table(
        {"name": "a", "task": "app:task", "rounds": 1, "secure_aggregation": {"enabled": True}}, source="run"
    )
    with pytest.raises(ConfigError, match="which looks at each of them"):
        SumTerms.of(run, FedAvg(aggregation=aggregation), Layout((Tensor("w", (2,)),)))
