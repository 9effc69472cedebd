"""Laws of pipelines, and one suite that every layer and every reduction passes: a new one is a new row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.exact import BLOCK, MAX_WEIGHT
from fedge.pipeline import (
    Aggregate,
    Clip,
    Identity,
    Layer,
    Mean,
    Pipeline,
    Reduction,
    Update,
    l2_norm,
    mean_of_metrics,
)
from fedge.robust import CoordinateMedian, TrimmedMean
from fedge.vector import Array

LAYERS: dict[str, Layer] = {"identity": Identity(), "clip": Clip(1.0), "a wide clip": Clip(1e30)}
REDUCTIONS: dict[str, Reduction] = {
    "mean by examples": Mean(),
    "uniform mean": Mean("uniform"),
    "median": CoordinateMedian(),
    "trimmed mean": TrimmedMean(0.2),
}

each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)

SIZE = 40
NOTHING: Array = np.zeros(0, np.float32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = st.lists(FINITE, min_size=1, max_size=12).map(lambda v: np.array(v, np.float32))


def updates(count: int = 5, size: int = SIZE, seed: int = 0) -> list[Update]:
    random = np.random.default_rng(seed)
    return [
        Update(
            f"site-{n}",
            (random.normal(size=size) * 10.0**n).astype(np.float32),
            int(random.integers(1, 10_000)),
            {"loss": float(random.normal() * 10.0 ** (3 * n)), f"only-{n % 2}": float(n)},
            staleness=n,
        )
        for n in range(count)
    ]


def reduce(pipeline: Pipeline | Reduction, given: list[Update], size: int = SIZE) -> Aggregate:
    state = pipeline.start(size)
    for update in given:
        state = pipeline.fold(state, update)
    return pipeline.finish(state)


def same_bits(one: Array, two: Array) -> bool:
    return bool(np.array_equal(one.view(np.uint32), two.view(np.uint32)))


# What every layer keeps to.


@each_layer
@given(vector=VECTORS)
@settings(max_examples=50, deadline=None)
def test_a_layer_returns_float32_of_the_same_length_and_leaves_its_input(layer, vector):
    before = vector.copy()
    encoded = layer.encode(vector)
    assert same_bits(vector, before)
    assert encoded.dtype == np.float32
    assert encoded.shape == vector.shape
    assert np.isfinite(encoded).all()
    decoded = layer.decode(encoded.copy())
    assert decoded.dtype == np.float32
    assert decoded.shape == vector.shape


@each_layer
def test_a_layer_is_deterministic(layer):
    vector = np.linspace(-3, 5, SIZE, dtype=np.float32)
    assert same_bits(layer.encode(vector), layer.encode(vector.copy()))


@each_layer
def test_a_layer_takes_an_empty_vector(layer):
    assert layer.encode(np.zeros(0, np.float32)).shape == (0,)


@each_layer
def test_a_layer_keeps_zero(layer):
    assert not layer.decode(layer.encode(np.zeros(5, np.float32))).any()


@pytest.mark.parametrize("value", [*LAYERS.values(), *REDUCTIONS.values()], ids=[*LAYERS, *REDUCTIONS])
def test_layers_and_reductions_are_frozen_comparable_printable_values(value):
    assert is_dataclass(value)
    assert copy.copy(value) == value
    assert hash(copy.copy(value)) == hash(value)
    assert type(value).__name__ in repr(value)
    assert " object at 0x" not in repr(value)
    for field in fields(value):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field.name, None)


# What every reduction keeps to.


@each_reduction
def test_a_reduction_of_one_update_is_that_update(reduction):
    (only,) = updates(1)
    found = reduce(reduction, [only])
    assert same_bits(found.vector, only.vector)
    assert found.clients == ("site-0",)
    assert found.num_examples == only.num_examples
    assert found.metrics == pytest.approx(only.metrics)


@each_reduction
def test_a_reduction_of_equal_vectors_is_that_vector(reduction):
    vector = updates(1)[0].vector
    given = [Update(str(n), vector, 1 + 977 * n) for n in range(6)]
    assert same_bits(reduce(reduction, given).vector, vector)


@each_reduction
@given(st.permutations(range(6)))
@settings(max_examples=30, deadline=None)
def test_a_reduction_does_not_depend_on_the_order_to_the_bit(reduction, order):
    given_ = updates(6)
    one = reduce(reduction, given_)
    two = reduce(reduction, [given_[n] for n in order])
    assert same_bits(one.vector, two.vector)
    assert list(one.metrics.items()) == list(two.metrics.items())
    assert (one.clients, one.num_examples, one.staleness) == (two.clients, two.num_examples, two.staleness)


class FromAFile:
    """A vector of which only slices are ever in memory."""

    def __init__(self, vector: Array) -> None:
        self._data = vector.tobytes()

    def __len__(self) -> int:
        return len(self._data) // 4

    def __getitem__(self, part: slice, /) -> Array:
        return np.frombuffer(self._data[4 * part.start : 4 * part.stop], np.float32)


@each_reduction
@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_folding_slice_by_slice_equals_folding_the_whole(reduction, size):
    given = updates(3, size)
    sliced = [replace(update, vector=FromAFile(update.vector)) for update in given]
    assert same_bits(reduce(reduction, sliced, size).vector, reduce(reduction, given, size).vector)


@each_reduction
@pytest.mark.parametrize("size", [7, 2 * BLOCK + 3])
@pytest.mark.parametrize("at_the_end", [0, 2, 5])
def test_updates_folded_together_or_at_the_end_equal_those_folded_one_by_one(reduction, size, at_the_end):
    given = updates(5, size)
    split = len(given) - at_the_end
    state = reduction.fold(reduction.start(size), *given[:split])
    found, expected = reduction.finish(state, *given[split:]), reduce(reduction, given, size)
    assert same_bits(found.vector, expected.vector)
    assert (found.clients, found.num_examples, found.staleness) == (
        expected.clients,
        expected.num_examples,
        expected.staleness,
    )
    assert found.metrics == expected.metrics


@each_reduction
def test_folding_leaves_updates_as_they_were(reduction):
    given = updates()
    before = [update.vector.copy() for update in given]
    reduce(reduction, given)
    assert all(same_bits(u.vector, b) for u, b in zip(given, before, strict=True))


@each_reduction
@pytest.mark.parametrize("num_examples", [0, -1, MAX_WEIGHT, 2**63])
def test_a_lie_about_the_number_of_examples_is_refused_and_costs_the_others_nothing(reduction, num_examples):
    honest = updates(3)
    state = reduction.start(SIZE)
    for update in honest:
        with pytest.raises(ValueError, match="expected num_examples"):
            reduction.fold(state, Update("liar", np.ones(SIZE, np.float32), num_examples))
        state = reduction.fold(state, update)
    found, expected = reduction.finish(state), reduce(reduction, honest)
    assert same_bits(found.vector, expected.vector)
    assert "liar" not in found.clients


@each_reduction
@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE + 1])
def test_a_vector_of_the_wrong_length_is_refused_and_costs_the_others_nothing(reduction, length):
    honest = updates(2)
    state = reduction.fold(reduction.start(SIZE), honest[0])
    with pytest.raises(ValueError, match=f"expected a vector of {SIZE} elements"):
        reduction.fold(state, Update("liar", np.ones(length, np.float32), 1))
    found = reduction.finish(reduction.fold(state, honest[1]))
    assert same_bits(found.vector, reduce(reduction, honest).vector)


@each_reduction
def test_the_bounds_of_the_number_of_examples_are_accepted(reduction):
    ones = np.ones(SIZE, np.float32)
    found = reduce(reduction, [Update("a", ones, 1), Update("b", ones, MAX_WEIGHT - 1)])
    assert found.num_examples == MAX_WEIGHT


@each_reduction
def test_a_reduction_of_nothing_is_an_error(reduction):
    with pytest.raises(ValueError, match="expected at least one update"):
        reduction.finish(reduction.start(SIZE))


@each_reduction
def test_a_reduction_of_size_zero_is_of_metrics_alone(reduction):
    given = [Update("a", NOTHING, 3, {"loss": 1.0}), Update("b", NOTHING, 3, {"loss": 2.0})]
    found = reduce(reduction, given, 0)
    assert found.vector.shape == (0,)
    assert found.metrics == {"loss": 1.5}
    assert found.clients == ("a", "b")


@each_reduction
def test_an_aggregate_says_who_is_in_it_how_much_and_how_stale(reduction):
    given = updates(4)
    found = reduce(reduction, given[::-1])
    assert found.clients == ("site-0", "site-1", "site-2", "site-3")
    assert found.num_examples == sum(update.num_examples for update in given)
    assert found.staleness == 3
    assert found.vector.dtype == np.float32


# What the means are.


def test_the_mean_by_examples_weighs_each_update_by_its_examples():
    given = [Update("a", np.array([1, 2], np.float32), 1, {"m": 0.0})]
    given += [Update("b", np.array([5, -2], np.float32), 3, {"m": 1.0})]
    assert reduce(Mean(), given, 2).vector.tolist() == [4.0, -1.0]
    assert reduce(Mean(), given, 2).metrics == {"m": 0.75}
    assert reduce(Mean("uniform"), given, 2).vector.tolist() == [3.0, 0.0]
    assert reduce(Mean("uniform"), given, 2).metrics == {"m": 0.5}


def test_a_mean_agrees_with_numpy_in_float64():
    given = updates(8, 500)
    weights = [update.num_examples for update in given]
    expected = np.average([u.vector.astype(np.float64) for u in given], axis=0, weights=weights)
    np.testing.assert_allclose(reduce(Mean(), given, 500).vector, expected, rtol=1e-6)


# Metrics.


def test_a_metric_is_averaged_over_those_who_report_it():
    found = mean_of_metrics([(1, {"a": 1.0, "b": 4.0}), (3, {"a": 5.0}), (9, {})])
    assert found == {"a": 4.0, "b": 4.0}


@pytest.mark.parametrize("lie", [math.nan, math.inf, -math.inf, 1e301, -1e308, 10**400])
def test_an_absurd_metric_makes_that_mean_nan_and_nothing_else(lie):
    """Found by review: two clients with 1e308, or infinities of both signs, made `finish` raise."""
    values = [(2, {"a": 1.0, "b": 2.0}), (5, {"a": lie}), (1, {"a": -1e308}), (1, {"a": math.inf})]
    for order in (values, values[::-1]):
        found = mean_of_metrics(order)
        assert math.isnan(found["a"])
        assert found["b"] == 2.0


def test_metrics_are_in_order_of_their_names():
    assert list(mean_of_metrics([(1, {"z": 1.0}), (1, {"a": 1.0}), (1, {"m": 1.0})])) == ["a", "m", "z"]


def test_a_mean_of_metrics_does_not_cancel_by_order():
    values = [(1, {"a": v}) for v in (1e16, 1.0, -1e16)]
    assert mean_of_metrics(values) == mean_of_metrics(values[::-1]) == {"a": 1 / 3}


# Clipping.


def norm64(vector: Array) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


@settings(max_examples=300, deadline=None)
@given(VECTORS, st.floats(min_value=1e-45, max_value=1e39, exclude_min=True))
def test_a_clipped_vector_is_never_longer_than_max_norm(vector, max_norm):
    clipped = Clip(max_norm).encode(vector)
    assert l2_norm(clipped) <= max_norm
    assert np.isfinite(clipped).all()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50).map(lambda v: np.array(v, np.float32)),
    st.floats(1e-3, 1e3),
)
def test_clipping_keeps_the_direction_and_all_of_the_length_that_is_allowed(vector, max_norm):
    clipped = Clip(max_norm).encode(vector)
    norm = norm64(vector)
    if norm <= max_norm:
        assert same_bits(clipped, vector)
    else:
        assert norm64(clipped) >= max_norm * (1 - 1e-6)
        expected = vector.astype(np.float64) * (max_norm / norm)
        np.testing.assert_allclose(clipped, expected, rtol=1e-6, atol=1e-44)


HARD_CLIPS: dict[str, tuple[Callable[[], Array], float]] = {
    "the largest floats": (lambda: np.full(100_000, np.finfo(np.float32).max, np.float32), 1e-3),
    "one among zeros": (lambda: np.eye(1, 70_000, 65_536, dtype=np.float32)[0], 0.1),
    "to subnormal numbers": (lambda: np.ones(1000, np.float32), 1e-43),
    "to less than the least number": (lambda: np.ones(3, np.float32), 1e-46),
    "between two numbers": (lambda: np.ones(1, np.float32), 2.4e-45),
    "very many ones": (lambda: np.ones(300_000, np.float32), 1.0),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("vector", "max_norm"), HARD_CLIPS.values(), ids=HARD_CLIPS)
def test_clipping_ends_within_its_guarantee_for(vector, max_norm):
    """Found by review: shrinking by one part in 2^22 never ends where numbers are subnormal."""
    assert l2_norm(Clip(max_norm).encode(vector())) <= max_norm


@pytest.mark.parametrize("max_norm", [0.0, -1.0, -math.inf, math.nan])
def test_a_clip_that_could_not_keep_its_guarantee_cannot_be_made(max_norm):
    with pytest.raises(ValueError, match="expected a max_norm above 0"):
        Clip(max_norm)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_refused_and_not_clipped(value):
    with pytest.raises(ValueError, match="expected a finite vector"):
        Clip(1.0).encode(np.array([1.0, value], np.float32))


def test_the_norm_is_accumulated_in_float64():
    assert l2_norm(np.full(4, 3e38, np.float32)) == pytest.approx(6e38, rel=1e-6)
    assert l2_norm(np.full(4, 1e-45, np.float32)) == 2 * float(np.float32(1e-45))
    many = np.random.default_rng(0).normal(size=200_001).astype(np.float32)
    assert l2_norm(many) == pytest.approx(norm64(many), rel=1e-12)
    assert l2_norm(np.zeros(0, np.float32)) == 0.0


# Pipelines.


@each_reduction
@pytest.mark.parametrize("layers", [(), (Identity(),), (Identity(), Identity())])
def test_an_identity_pipeline_is_its_reduction(reduction, layers):
    pipeline = Pipeline(reduction, layers)
    given = updates()
    encoded = [replace(u, vector=pipeline.encode(u.vector)) for u in given]
    found, expected = reduce(pipeline, encoded), reduce(reduction, given)
    assert same_bits(found.vector, expected.vector)
    assert (found.clients, found.num_examples, found.metrics, found.staleness) == (
        expected.clients,
        expected.num_examples,
        expected.metrics,
        expected.staleness,
    )


@dataclass(frozen=True, slots=True)
class Plus:
    """A layer for these tests, of which two do not commute with `Times`."""

    amount: float

    def encode(self, vector: Array) -> Array:
        return vector + np.float32(self.amount)

    def decode(self, aggregate: Array) -> Array:
        return aggregate - np.float32(self.amount)


@dataclass(frozen=True, slots=True)
class Times:
    amount: float

    def encode(self, vector: Array) -> Array:
        return vector * np.float32(self.amount)

    def decode(self, aggregate: Array) -> Array:
        return aggregate / np.float32(self.amount)


def test_sites_encode_in_order_and_the_aggregate_is_decoded_in_reverse():
    pipeline = Pipeline(Mean(), (Plus(1.0), Times(4.0)))
    vector = np.array([1.0, 2.0], np.float32)
    encoded = pipeline.encode(vector)
    assert encoded.tolist() == [8.0, 12.0]
    assert reduce(pipeline, [Update("a", encoded, 1)], 2).vector.tolist() == [1.0, 2.0]


def test_the_mean_of_clipped_updates_is_no_longer_than_the_clip():
    pipeline = Pipeline(Mean("uniform"), (Clip(0.5),))
    given = [Update(u.client, pipeline.encode(u.vector), 1) for u in updates(6)]
    assert norm64(reduce(pipeline, given).vector) <= 0.5 * (1 + 1e-7)


def test_a_client_cannot_pull_a_uniform_mean_further_than_its_clip_over_the_cohort():
    pipeline = Pipeline(Mean("uniform"), (Clip(1.0),))
    honest = [Update(f"h{n}", np.zeros(3, np.float32), 1) for n in range(9)]
    for lie in (1e3, 1e38):
        encoded = pipeline.encode(np.full(3, lie, np.float32))
        found = reduce(pipeline, [*honest, Update("liar", encoded, 1)], 3)
        assert norm64(found.vector) <= 0.1 * (1 + 1e-6)


def test_states_before_a_fold_still_tell_who_was_in_them():
    mean = Mean()
    states = [mean.start(SIZE)]
    for update in updates(4):
        states.append(mean.fold(states[-1], update))
    assert [len(state.clients) for state in states] == [0, 1, 2, 3, 4]
    assert all(before.weight < after.weight for before, after in pairwise(states))
