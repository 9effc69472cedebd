"""The gate: what leaves is what it claims to be, clipped and protected as the run's terms say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge.errors import RefusedError
from fedge.exact import MAX_WEIGHT
from fedge.pipeline import l2_norm
from fedge.privacy.terms import Terms
from fedge.refusal import RefusalCode
from fedge.vector import Array, Layout, Tensor
from fedge.wire.limits import MAX_METRICS
from fedge_client.gate import Released, layers_of, release

LAYOUT = Layout((Tensor("w", (3,)), Tensor("b", ())))
FINE: Array = np.array([3.0, 0.0, 4.0, 0.0], np.float32)


def refused(call: Callable[[], object]) -> RefusalCode:
    with pytest.raises(RefusedError) as error:
        call()
    assert str(error.value)
    return error.value.refusal.code


def let_out(
    vector: Array = FINE, num_examples: int = 10, clip: float | None = None, **metrics: float
) -> Released:
    return release(vector, num_examples, metrics, layout=LAYOUT, layers=layers_of(clip))


# What leaves.


def test_an_update_that_is_what_it_claims_leaves_as_it_is():
    released = let_out(train_loss=0.5)
    np.testing.assert_array_equal(released.vector, FINE)
    assert (released.num_examples, dict(released.metrics)) == (10, {"train_loss": 0.5})


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from([None, 1.0]))
def test_one_number_that_is_not_finite_keeps_the_update_in(at, bad, clip):
    vector = FINE.copy()
    vector[at] = bad
    # A model that diverged has such metrics, too; the reason given is the one that helps.
    assert refused(lambda: let_out(vector, clip=clip, train_loss=math.nan)) == RefusalCode.NOT_FINITE


def test_the_largest_finite_numbers_are_finite():
    vector = np.full(4, np.finfo(np.float32).max, np.float32)
    np.testing.assert_array_equal(let_out(vector).vector, vector)


@pytest.mark.parametrize(
    "vector",
    [FINE[:3], np.zeros(5, np.float32), FINE.astype(np.float64), FINE.reshape(2, 2), np.zeros(0, np.float32)],
    ids=["short", "long", "float64", "a matrix", "empty"],
)
def test_a_vector_that_is_not_of_the_runs_layout_stays_in(vector):
    assert refused(lambda: let_out(vector)) == RefusalCode.WRONG_LENGTH


@pytest.mark.parametrize("num_examples", [0, -1, MAX_WEIGHT, 2.5])
def test_an_update_that_weighs_nothing_or_too_much_stays_in(num_examples):
    assert refused(lambda: let_out(num_examples=num_examples)) == RefusalCode.BAD_WEIGHT
    assert let_out(num_examples=MAX_WEIGHT - 1).num_examples == MAX_WEIGHT - 1
    assert type(let_out(num_examples=np.int32(7)).num_examples) is int  # type: ignore[arg-type]  # as a task may count


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"": 1.0},
        {"a\x1b": 1.0},
        {"x" * 300: 1.0},
        {"\udcff": 1.0},
        {1: 1.0},
        {"loss": "low"},
        {f"m{number}": 1.0 for number in range(MAX_METRICS + 1)},
    ],
)
def test_metrics_that_are_not_finite_numbers_under_short_names_keep_the_update_in(metrics):
    assert refused(lambda: release(FINE, 1, metrics, layout=LAYOUT, layers=())) == RefusalCode.BAD_METRICS


def test_an_evaluation_leaves_without_any_vector():
    leftovers = np.full(4, math.nan, np.float32)
    released = release(leftovers, 5, {"loss": 1.0}, layout=None, layers=layers_of(1.0))
    assert len(released.vector) == 0
    assert dict(released.metrics) == {"loss": 1.0}
    code = refused(lambda: release(leftovers, 5, {"loss": math.nan}, layout=None, layers=()))
    assert code == RefusalCode.BAD_METRICS


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, 4, elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.floats(1e-6, 1e6),
)
def test_what_leaves_is_never_longer_than_the_clip_and_shorter_ones_are_left_alone(vector, clip):
    before = vector.copy()
    out = let_out(vector, clip=clip).vector
    assert l2_norm(out) <= clip
    if l2_norm(vector) <= clip:
        np.testing.assert_array_equal(out, vector)
    np.testing.assert_array_equal(vector, before)


def test_a_clipped_update_keeps_its_direction():
    np.testing.assert_allclose(let_out(clip=1.0).vector, FINE / 5, rtol=1e-6)


# Under terms of privacy.

EXAMPLE = Terms("example", 1e-5, 1.0, 10, epsilon=3.0)
CLIENT = Terms("client", 1e-5, 1.0, 10, epsilon=3.0, loss_bound=4.0)
PARTS = Layout(
    (Tensor("w", (2,)), Tensor("frozen", (1,), role="frozen"), Tensor("mean", (1,), role="buffer"))
)


@pytest.mark.parametrize("terms", [EXAMPLE, CLIENT])
def test_a_private_update_tells_neither_its_number_of_examples_nor_any_metric(terms):
    released = release(FINE, 4711, {"train_loss": 0.5}, layout=LAYOUT, layers=(), terms=terms)
    assert (released.num_examples, dict(released.metrics)) == (1, {})


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("terms", [EXAMPLE, CLIENT], ids=lambda terms: terms.unit)
def test_nothing_leaves_to_which_no_noise_is_added(terms, at):
    vector = np.zeros(4, np.float32)
    vector[:2] = 1
    release(vector, 1, {}, layout=PARTS, layers=layers_of(1.0), terms=terms)
    vector[at] = 1e-30
    code = refused(lambda: release(vector, 1, {}, layout=PARTS, layers=layers_of(1.0), terms=terms))
    assert code == RefusalCode.PROTECTION_UNAVAILABLE


@pytest.mark.parametrize(("value", "left"), [(0.25, 0.25), (-1, 0), (9, 1), (math.nan, 0), (math.inf, 0)])
def test_at_client_level_a_metric_is_bounded_before_it_leaves(value, left):
    released = release(FINE, 7, {"accuracy": value}, layout=None, layers=(), terms=CLIENT)
    assert (released.num_examples, dict(released.metrics)) == (1, {"accuracy": left})


def test_a_loss_has_a_bound_of_its_own():
    assert release(FINE, 7, {"loss": 9.0}, layout=None, layers=(), terms=CLIENT).metrics == {"loss": 4.0}
