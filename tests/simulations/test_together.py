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
from fedge_client.torch.trainer import Outcome
from fedge_sim.engines.together import pass_together

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
    outcomes = [outcome for outcome, _ in updates]
    vectors = np.array([row for _, row in updates], np.float32)
    together = pass_together(outcomes, vectors)
    try:
        alone = [
            release(row, each.num_examples, each.metrics, layout=LAYOUT, layers=())
            for each, row in zip(outcomes, vectors, strict=True)
        ]
    except RefusedError:
        assert together is None
        return
    assert together is not None
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.vector, other.vector)
        assert (one.num_examples, dict(one.metrics)) == (other.num_examples, dict(other.metrics))


@pytest.mark.parametrize("count", [64, 65])
def test_as_many_metrics_pass_as_the_gate_lets_pass(count: int):
    metrics = {f"m{at}": 1.0 for at in range(count)}
    assert (pass_together([Outcome(1, metrics)], np.ones((1, 3), np.float32)) is None) == (count > 64)
