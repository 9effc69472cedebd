"""The exact sum against rational arithmetic, in any order and any grouping, and what it costs."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import parallel
from fedge.exact import BLOCK, MAX_WEIGHT, ExactSum, Term, mean_of_rows
from fedge.vector import Array

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
LARGEST = float(np.finfo(np.float32).max)
EXTREMES = st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1e-30, 1e-7, 1.0, -1.0, 1 / 3, 16777215.0, LARGEST, -LARGEST]
)
VALUES = (FINITE | EXTREMES).map(np.float32)
WEIGHTS = st.sampled_from([1, 2, 3, 255, 10**6, MAX_WEIGHT - 1]) | st.integers(1, MAX_WEIGHT - 1)
Pair = tuple[int, Array]


def reference(terms: list[Pair], total: int) -> Array:
    """The exact sum, rounded once to float64, divided by the weight, rounded to float32."""
    size = len(terms[0][1])
    sums = [sum(w * Fraction(float(v[i])) for w, v in terms) for i in range(size)]
    return np.array([np.float32(float(exact) / float(total)) for exact in sums], np.float32)


def mean(terms: list[Pair]) -> Array:
    total = ExactSum(len(terms[0][1]))
    for weight, values in terms:
        total.add(Term(values, weight))
    return total.mean(sum(weight for weight, _ in terms))


def assert_same_bits(one: Array, two: Array) -> None:
    np.testing.assert_array_equal(one.view(np.uint32), two.view(np.uint32))


@st.composite
def several_terms(draw: st.DrawFn) -> list[Pair]:
    size = draw(st.integers(1, 6))
    vector = st.lists(VALUES, min_size=size, max_size=size).map(lambda v: np.array(v, np.float32))
    return draw(st.lists(st.tuples(WEIGHTS, vector), min_size=1, max_size=12))


# Exactness.


@settings(max_examples=250, deadline=None)
@given(several_terms())
def test_the_mean_is_the_exact_sum_rounded_once(terms):
    assert_same_bits(mean(terms), reference(terms, sum(w for w, _ in terms)))


@settings(max_examples=100, deadline=None)
@given(several_terms(), st.randoms(use_true_random=False))
def test_no_order_of_arrival_changes_a_bit(terms, random):
    shuffled = terms[:]
    random.shuffle(shuffled)
    assert_same_bits(mean(shuffled), mean(terms))


@settings(max_examples=100, deadline=None)
@given(several_terms())
def test_what_cancels_leaves_nothing_behind(terms):
    rest = np.array([1e-45] * len(terms[0][1]), np.float32)
    cancelled = [(1, rest), *terms, *((w, -v) for w, v in reversed(terms))]
    total = ExactSum(len(rest))
    for weight, values in cancelled:
        total.add(Term(values, weight))
    assert_same_bits(total.mean(1), rest)


def test_a_bit_is_found_again_under_six_levels_of_cancellation():
    """Found by design: each level is 2^53 below the one above, so that every component is in use."""
    levels = [float(2.0**e) for e in (127, 74, 21, -32, -85, -138)]
    up = [(1, np.array([level], np.float32)) for level in levels]
    down = [(1, -values) for _, values in up]
    least = np.array([1e-45], np.float32)
    total = ExactSum(1)
    for weight, values in [*up, (1, least), *down]:
        total.add(Term(values, weight))
    assert_same_bits(total.mean(1), least)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("least", "expected"), [(2.0**-100, 2.0**24 + 2), (-(2.0**-100), 2.0**24)])
def test_the_least_component_decides_how_a_tie_is_rounded(sign, least, expected):
    """2^24 + 1 is halfway between two float32, and 2^-29 more is halfway between two float64."""
    terms = [(1, np.array([sign * v], np.float32)) for v in (2.0**24, 1.0, 2.0**-29, least)]
    total = ExactSum(1)
    for weight, values in terms:
        total.add(Term(values, weight))
    assert total.mean(1)[0] == sign * expected == reference(terms, 1)[0]


def test_zero_has_one_sign_whatever_came_first():
    """Found by review: a negative zero stayed negative unless another element of its block spilled."""
    terms = [(1, np.array(v, np.float32)) for v in ([1e20, -0.0], [1, -0.0], [-1e20, -0.0])]
    assert_same_bits(mean(terms), mean([terms[0], terms[2], terms[1]]))
    assert not np.signbit(mean([(1, np.array([-0.0], np.float32))])[0])


@pytest.mark.parametrize("value", [LARGEST, -LARGEST])
def test_the_largest_float_times_the_largest_weight_does_not_overflow(value):
    terms = [(MAX_WEIGHT - 1, np.array([value], np.float32))] * 50
    assert mean(terms)[0] == value


def test_a_mean_of_equal_vectors_is_that_vector():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert_same_bits(mean([(w, values) for w in (1, 7, 123_456, MAX_WEIGHT - 1)]), values)


def test_a_sum_of_nothing_is_zero():
    np.testing.assert_array_equal(ExactSum(3).mean(1), np.zeros(3, np.float32))
    assert ExactSum(0).mean(1).shape == (0,)


# Blocks and chunks.

SIZES = [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5, 3 * BLOCK - 1]


def random_terms(size: int, count: int, seed: int = 0) -> list[Pair]:
    """Vectors whose elements span 60 powers of two: most sums need several components."""
    random = np.random.default_rng(seed)
    return [
        (
            int(random.integers(1, MAX_WEIGHT)),
            np.ldexp(random.normal(size=size), random.integers(-30, 30, size)).astype(np.float32),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("size", SIZES)
def test_a_sum_of_any_size_is_exact_in_every_block(size):
    terms = random_terms(size, 6)
    found = mean(terms)
    assert found.shape == (size,)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    checked = sorted({0, size // 2, size - 1, *range(0, size, BLOCK), *range(7, size, 4001)})
    part = [(weight, values[checked]) for weight, values in terms]
    assert_same_bits(found[checked], reference(part, sum(w for w, _ in terms)))


@pytest.mark.parametrize("groups", [(5,), (1, 4), (2, 2, 1), (0, 5)])
@pytest.mark.parametrize("last", [0, 1, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_grouping_on_any_number_of_threads_gives_the_same_bits(groups, last, threads, monkeypatch):
    size = 3 * BLOCK + 17
    pairs = random_terms(size, 5 + last)
    expected = mean(pairs)
    monkeypatch.setattr(parallel, "ELEMENTS", BLOCK)
    monkeypatch.setattr(parallel, "processors", lambda: threads)
    terms = [Term(values, weight) for weight, values in pairs]
    total, at = ExactSum(size), 0
    for count in groups:
        total.add(*terms[at : at + count])
        at += count
    assert_same_bits(total.mean(sum(w for w, _ in pairs), *terms[at:]), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [BLOCK - 1, 3 * BLOCK + 17])
def test_a_mean_of_last_terms_alone_gives_the_same_bits(size, threads, monkeypatch):
    pairs = random_terms(size, 4)
    expected = mean(pairs)
    monkeypatch.setattr(parallel, "ELEMENTS", BLOCK)
    monkeypatch.setattr(parallel, "processors", lambda: threads)
    found = ExactSum(size).mean(sum(w for w, _ in pairs), *(Term(v, w) for w, v in pairs))
    assert_same_bits(found, expected)


def test_an_error_while_a_thread_reads_is_raised_to_the_caller(monkeypatch):
    class Broken:
        def __len__(self) -> int:
            return 4 * BLOCK

        def __getitem__(self, part: slice, /) -> Array:
            raise OSError("the disk is gone")

    monkeypatch.setattr(parallel, "ELEMENTS", BLOCK)
    with pytest.raises(OSError, match="the disk is gone"):
        ExactSum(4 * BLOCK).add(Term(Broken(), 1))


def test_strided_and_read_only_values_are_added_by_value():
    wide = np.arange(20, dtype=np.float32)
    read_only = wide[::2].copy()
    read_only.setflags(write=False)
    assert_same_bits(mean([(3, wide[::2])]), mean([(3, read_only)]))


def test_adding_leaves_the_values_as_they_were():
    values = np.arange(10, dtype=np.float32)
    mean([(5, values), (7, values)])
    np.testing.assert_array_equal(values, np.arange(10))


@pytest.mark.parametrize("length", [0, 1, 9, 11])
@pytest.mark.parametrize("others", [0, 1])
def test_a_term_of_another_size_is_refused_before_it_changes_anything(length, others):
    total = ExactSum(10)
    total.add(Term(np.ones(10, np.float32), 1))
    given = [*[Term(np.ones(10, np.float32), 1)] * others, Term(np.ones(length, np.float32), 1)]
    with pytest.raises(ValueError, match="expected a vector of 10 elements"):
        total.add(*given)
    with pytest.raises(ValueError, match="expected a vector of 10 elements"):
        total.mean(1, *given)
    np.testing.assert_array_equal(total.mean(1), np.ones(10))


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT, 2**70])
def test_a_weight_whose_product_might_be_inexact_is_refused(weight):
    with pytest.raises(ValueError, match="expected a weight"):
        Term(np.ones(3, np.float32), weight)


# From sparse errors to dense blocks, and what it costs.


@pytest.mark.parametrize("share", [0.0, 0.01, 0.12, 0.13, 0.5, 1.0])
@pytest.mark.parametrize("rounds", [1, 3])
def test_errors_in_any_share_of_the_elements_are_kept_exactly(share, rounds):
    size = 800
    random = np.random.default_rng(5)
    terms: list[Pair] = []
    for _ in range(rounds):
        small = random.normal(size=size).astype(np.float32)
        big = np.where(random.random(size) < share, np.float32(1e30), small).astype(np.float32)
        terms += [(1, big), (3, small), (1, -big), (MAX_WEIGHT - 1, small[::-1])]
    found = mean(terms)
    assert_same_bits(found, reference(terms, sum(w for w, _ in terms)))


def cost(terms: list[Pair]) -> float:
    """Bytes of the sum's components after all terms, as a multiple of the float32 vector's."""
    total = ExactSum(len(terms[0][1]))
    assert total.nbytes == 0
    for weight, values in terms:
        total.add(Term(values, weight))
    return total.nbytes / terms[0][1].nbytes


def test_updates_of_like_magnitude_cost_twice_the_vector():
    random = np.random.default_rng(0)
    terms = [
        (int(random.integers(1, 1000)), random.normal(size=2 * BLOCK + 100).astype(np.float32))
        for _ in range(100)
    ]
    assert 2.0 <= cost(terms) <= 2.02


def test_a_few_odd_elements_are_kept_sparsely_and_exactly():
    random = np.random.default_rng(0)
    vectors = [random.normal(size=BLOCK).astype(np.float32) for _ in range(20)]
    vectors[0][:50] = 1e30
    vectors[-1][:50] = -1e30
    terms = [(1, vector) for vector in vectors]
    assert 2.0 < cost(terms) < 2.2
    part = [(1, vector[:100]) for vector in vectors]
    assert_same_bits(mean(terms)[:100], reference(part, len(part)))


def test_hostile_updates_cost_a_bounded_multiple_of_the_vector_however_many_they_are():
    assert cost(random_terms(BLOCK, 40)) <= 2 * 4
    spread = [np.ldexp(np.ones(BLOCK), e).astype(np.float32) for e in range(-149, 127, 3)]
    terms = [(MAX_WEIGHT - 1, values * sign) for sign in (1, -1) for values in spread]
    assert cost(terms[: len(spread)]) <= 2 * 8
    assert cost(terms * 2) <= 2 * 8


# Many at once.


@settings(max_examples=150, deadline=None)
@given(several_terms(), st.integers(1, 40))
def test_many_terms_at_once_are_what_they_are_one_after_another(terms, times):
    many = [pair for _ in range(times) for pair in terms]
    total = ExactSum(len(terms[0][1]))
    total.add(*(Term(values, weight) for weight, values in many))
    assert_same_bits(total.mean(sum(w for w, _ in many)), mean(many))


@pytest.mark.parametrize("spread", [1.0, 1e4, 1e15])
@pytest.mark.parametrize("size", [5, BLOCK + 3])
def test_many_terms_of_any_spread_are_added_exactly(size: int, spread: float):
    """With none, a few and nearly all places at which a plain sum would round."""
    rng = np.random.default_rng(int(spread) + size)
    values = rng.standard_normal((40, size)) * np.exp(rng.uniform(-1, 1, (40, size)) * np.log(spread))
    values[rng.random(values.shape) < 0.2] = 0.0
    terms = [(int(rng.integers(1, 500)), row) for row in values.astype(np.float32)]
    total = ExactSum(size)
    total.add(*(Term(values, weight) for weight, values in terms))
    assert_same_bits(total.mean(sum(w for w, _ in terms)), mean(terms))


@pytest.mark.parametrize("size", [1, 300, 16_384, 16_385, 70_000])
@pytest.mark.parametrize("weights", [[7] * 20, list(range(1, 21))], ids=["alike", "unlike"])
def test_many_terms_at_once_are_the_terms_one_by_one(size: int, weights: list[int]):
    """Short vectors are summed by columns, long ones by rows; where plain sums would round, neither is used."""
    generator = np.random.default_rng(size)
    vectors = generator.standard_normal((20, size)).astype(np.float32)
    vectors *= np.float32(2.0) ** generator.integers(-12, 12, (20, size)).astype(np.float32)
    vectors[generator.random((20, size)) < 0.2] = 0.0
    vectors[3, :: max(1, size // 50)] = np.float32(3e38)
    vectors[5, :: max(1, size // 70)] = np.float32(1e-45)
    vectors[7, size // 2] = -0.0
    together, alone = ExactSum(size), ExactSum(size)
    terms = [Term(vector, weight) for vector, weight in zip(vectors, weights, strict=True)]
    together.add(*terms)
    for term in reversed(terms):
        alone.add(term)
    mean = together.mean(sum(weights))
    assert np.array_equal(mean.view(np.uint32), alone.mean(sum(weights)).view(np.uint32))
    assert np.array_equal(mean, ExactSum(size).mean(sum(weights), *terms))


@settings(max_examples=150, deadline=None)
@given(several_terms(), st.integers(1, 12))
def test_a_mean_of_rows_is_that_of_their_sum(terms, times):
    """Also where there are few of them, or where plain sums would round."""
    many = [pair for _ in range(times) for pair in terms]
    found = mean_of_rows(np.stack([values for _, values in many]), [weight for weight, _ in many])
    assert_same_bits(found, mean(many))


@pytest.mark.parametrize("size", [1, 300, 5000, 16_384, 16_385, 70_000])
@pytest.mark.parametrize("spread", [1.0, 1e4, 1e15])
def test_a_mean_of_many_rows_is_exact_whatever_their_spread(size: int, spread: float):
    rng = np.random.default_rng(size)
    values = rng.standard_normal((60, size)) * np.exp(rng.uniform(-1, 1, (60, size)) * np.log(spread))
    values[rng.random(values.shape) < 0.2] = 0.0
    rows, weights = values.astype(np.float32), rng.integers(1, 500, 60).tolist()
    assert_same_bits(mean_of_rows(rows, weights), mean(list(zip(weights, rows, strict=True))))
    assert np.array_equal(rows, values.astype(np.float32)), "they are as they were"


def test_a_mean_of_long_rows_is_made_on_threads_to_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((8, (1 << 21) + 5)).astype(np.float32)
    rows[3, ::1000] = np.float32(1e30)
    terms = [Term(row, weight) for weight, row in enumerate(rows, start=1)]
    assert np.array_equal(mean_of_rows(rows, range(1, 9)), ExactSum(rows.shape[1]).mean(36, *terms))


def test_weights_may_be_numpys() -> None:
    rows = np.ones((9, 3), np.float32)
    weights = list(np.arange(1, 10))
    assert mean_of_rows(rows, weights).tolist() == [1.0] * 3
    terms = [Term(row, weight) for row, weight in zip(rows, weights, strict=True)]
    assert ExactSum(3).mean(45, *terms).tolist() == [1.0] * 3


@pytest.mark.parametrize(("count", "size"), [(0, 3), (9, 0)])
def test_of_nothing_there_is_a_mean_of_that_size(count: int, size: int) -> None:
    with np.errstate(invalid="ignore"):
        assert mean_of_rows(np.ones((count, size), np.float32), [1] * count).shape == (size,)


@pytest.mark.parametrize("weights", [[1] * 9 + [0], [1] * 9, [1] * 9 + [MAX_WEIGHT]])
def test_rows_have_a_weight_each(weights: list[int]):
    with pytest.raises(ValueError, match=r"expected 10 weights in \[1, 536870912\), found (9|10)"):
        mean_of_rows(np.ones((10, 3), np.float32), weights)
