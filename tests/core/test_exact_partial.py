"""Sums that were begun in several places: what they come to together is what one sum would, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.exact import BLOCK, MAX_WEIGHT, ExactSum, Term
from fedge.vector import Array

LARGEST = float(np.finfo(np.float32).max)
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1e-30, 1.0, -1.0, 1 / 3, 16777215.0, LARGEST, -LARGEST]
)
WEIGHTS = st.sampled_from([1, 2, 255, MAX_WEIGHT - 1]) | st.integers(1, MAX_WEIGHT - 1)


@st.composite
def places(draw: st.DrawFn) -> list[list[Term]]:
    """What each of several places has to add, some of them nothing."""
    size = draw(st.integers(1, 5))
    vector = st.lists(VALUES, min_size=size, max_size=size).map(lambda some: np.array(some, np.float32))
    terms = st.lists(st.builds(Term, vector, WEIGHTS), max_size=10)
    return draw(st.lists(terms, min_size=1, max_size=5).filter(any))


def together(parts: list[list[Term]], size: int) -> Array:
    whole = ExactSum(size)
    for part in parts:
        its = ExactSum(size)
        its.add(*part)
        whole.add_partial(its.partial())
    return whole.mean(sum(term.weight for part in parts for term in part))


def alone(parts: list[list[Term]], size: int) -> Array:
    terms = [term for part in parts for term in part]
    whole = ExactSum(size)
    for term in terms:
        whole.add(term)
    return whole.mean(sum(term.weight for term in terms))


@settings(max_examples=300, deadline=None)
@given(places())
def test_sums_of_several_places_are_the_sum_of_all_their_terms(parts: list[list[Term]]):
    size = len(next(term for part in parts for term in part).values)
    assert np.array_equal(together(parts, size).view(np.uint32), alone(parts, size).view(np.uint32))


@pytest.mark.parametrize("spread", [0, 8, 60])
def test_so_are_those_of_many_blocks_whose_errors_are_few_or_many(spread: int):
    size = 2 * BLOCK + 11
    generator = np.random.default_rng(spread)
    values = generator.standard_normal((24, size)) * 2.0 ** generator.integers(
        -spread, spread + 1, (24, size)
    )
    terms = [Term(row, number + 1) for number, row in enumerate(values.astype(np.float32))]
    parts = [terms[:1], terms[1:12], [], terms[12:]]
    assert np.array_equal(together(parts, size), alone(parts, size))


def test_a_partial_sum_of_updates_of_like_magnitude_is_twice_a_vector():
    generator = np.random.default_rng(1)
    size = BLOCK
    total = ExactSum(size)
    total.add(*(Term(generator.standard_normal(size).astype(np.float32), 3) for _ in range(20)))
    partial = total.partial()
    assert 8 * size <= partial.nbytes < 8.8 * size
    assert total.nbytes == 0, "it is consumed"


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_sum_of_another_size_is_refused_before_it_changes_anything(size: int):
    total, other = ExactSum(4), ExactSum(size)
    total.add(Term(np.ones(4, np.float32), 1))
    with pytest.raises(ValueError, match=f"expected a sum of 4 elements, found {size}"):
        total.add_partial(other.partial())
    assert np.array_equal(total.mean(1), np.ones(4, np.float32))
