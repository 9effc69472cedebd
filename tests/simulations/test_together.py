"""A cohort's updates through the gate at once: what passes is what the gate lets pass one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import RefusedError
from fedge.exact import MAX_WEIGHT
from fedge.vector import Layout, Tensor
from fedge_client.gate import release
from fedge_client.local import Outcome
from fedge_sim.engines.together import all_pass

LAYOUT = Layout((Tensor("w", (3,)),))
NAMES = st.sampled_from(["loss", "accuracy", "", "two\nlines", "x" * 256, "ä" * 129])
NUMBERS = st.sampled_from([0.0, 1.5, -2.0, math.nan, math.inf, -math.inf])
OUTCOMES = st.builds(
    Outcome,
    st.sampled_from([1, 1, 7, 0, MAX_WEIGHT - 1, MAX_WEIGHT]),
    st.dictionaries(NAMES, st.sampled_from([0.0, 1.5]) | NUMBERS, max_size=2),
)
ROWS = st.tuples(*[st.sampled_from([0.0, 1.0, -1e30])] * 3)


@given(st.lists(st.tuples(OUTCOMES, ROWS), min_size=1, max_size=4))
def test_updates_pass_together_if_the_gate_lets_each_of_them_pass(updates):
    together = all_pass([outcome for outcome, _ in updates])
    try:
        for each, row in updates:
            vector = np.array(row, np.float32)
            alone = release(vector, each.num_examples, each.metrics, layout=LAYOUT, layers=())
            assert np.array_equal(alone.vector, vector), "as it is"
            assert (alone.num_examples, dict(alone.metrics)) == (each.num_examples, dict(each.metrics))
    except RefusedError:
        assert not together
        return
    assert together


@pytest.mark.parametrize("count", [64, 65])
def test_as_many_metrics_pass_as_the_gate_lets_pass(count: int):
    metrics = {f"m{at}": 1.0 for at in range(count)}
    assert all_pass([Outcome(1, metrics)]) == (count <= 64)
