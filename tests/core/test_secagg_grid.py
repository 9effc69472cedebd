"""Noise on the integer grid: drawn exactly, added up by many sites, and paid for exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from fedge.errors import RunError
from fedge.privacy.mechanism import Gaussian, Skellam
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.secure import SecureSource
from fedge.privacy.skellam import SkellamSampler
from fedge.secagg.grid import Grid, conditional_round, rounded_norm


def source(number: int = 0) -> SecureSource:
    return SecureSource(number.to_bytes(32, "little"))


# The sampler.


@pytest.mark.parametrize("variance", [0.01, 0.5, 1.0, 7.3, 100.0, 2500.0])
def test_draws_have_the_distribution_of_the_difference_of_two_poisson_variables(variance: float):
    drawn = SkellamSampler.of(variance).sample(source(1), 300_000)
    values, counts = np.unique(drawn, return_counts=True)
    expected = stats.skellam.pmf(values, variance / 2, variance / 2) * len(drawn)
    often = expected >= 10
    rest = len(drawn) - counts[often].sum(), len(drawn) - expected[often].sum()
    observed = np.append(counts[often], rest[0])
    wanted = np.append(expected[often], max(rest[1], 1e-9))
    if wanted[-1] < 10:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("variance", [1.0, 1e4, 1e6])
def test_moments_are_those_of_the_distribution(variance: float):
    drawn = SkellamSampler.of(variance).sample(source(2), 400_000).astype(np.float64)
    size = len(drawn)
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / size)
    assert drawn.var() == pytest.approx(variance, rel=6 * math.sqrt((2 + 1 / variance) / size))
    kurtosis = (drawn**4).mean() / variance**2
    assert kurtosis == pytest.approx(3 + 1 / variance, rel=0.05)


@pytest.mark.parametrize("variance", [0.3, 64.0])
def test_the_table_is_exact_to_128_bits_and_symmetric(variance: float):
    sampler = SkellamSampler.of(variance)
    unit = 1 << 128
    masses = np.diff([0, *sampler.cumulative])
    middle = sampler.reach
    for k in range(5):
        # Both halves are rounded down on their own, so that they differ by a unit or two at most.
        assert abs(int(masses[middle + k]) - int(masses[middle - k])) <= 2
        exact = stats.skellam.pmf(k, variance / 2, variance / 2)
        assert float(Fraction(int(masses[middle + k]), unit)) == pytest.approx(exact, rel=1e-9)
    assert sampler.cumulative[-1] >= unit - 4 * middle
    assert sampler.cumulative[0] <= 2


def test_where_the_upper_half_of_a_word_does_not_decide_its_lower_half_does():
    sampler = SkellamSampler.of(4.0)
    boundary = sampler.cumulative[sampler.reach]

    class Boundary:
        """Always the upper half of P(X <= 0), and then a lower half of all ones, or none."""

        def __init__(self, low: int) -> None:
            self.low = low

        def uint64(self, count: int) -> np.ndarray:
            if count > 1:
                return np.full(count, boundary >> 64, np.uint64)
            return np.array([self.low], np.uint64)

    assert boundary & ((1 << 64) - 1) not in (0, (1 << 64) - 1)
    assert set(sampler.sample(Boundary(0), 2)) == {0}  # type: ignore[arg-type]  # its surface
    assert set(sampler.sample(Boundary((1 << 64) - 1), 2)) == {1}  # type: ignore[arg-type]


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 2.0**31])
def test_a_variance_that_has_no_table_is_refused(variance: float):
    with pytest.raises(ValueError, match="variance"):
        SkellamSampler.of(variance)


def test_shares_of_many_sites_add_up_to_the_noise_of_the_whole():
    shares = sum(SkellamSampler.of(2.5).sample(source(at), 200_000) for at in range(8))
    values, counts = np.unique(shares, return_counts=True)
    wanted = stats.skellam.pmf(values, 10, 10) * 200_000
    often = wanted >= 10
    scale = counts[often].sum() / wanted[often].sum()
    assert stats.chisquare(counts[often], wanted[often] * scale).pvalue > 1e-4


# Rounding.


@given(
    npst.arrays(np.float64, st.integers(1, 30), elements=st.floats(-50, 50)),
    st.integers(0, 2**32),
)
def test_rounding_moves_no_element_by_a_step_and_keeps_the_norm_that_is_paid_for(vector, seed):
    most = rounded_norm(float(np.linalg.norm(vector)), len(vector))
    rounded = conditional_round(vector, 1.0, most, source(seed))
    assert np.abs(rounded - vector).max() < 1
    assert np.linalg.norm(rounded) <= most * (1 + 1e-12)
    assert np.linalg.norm(rounded, 1) <= min(math.sqrt(len(vector)) * most, most**2) * (1 + 1e-12)


def test_rounding_is_fair():
    vector = np.repeat([0.25, -0.25, 0.5, -1.75], 50_000)
    rounded = conditional_round(vector, 1.0, math.inf, source())
    for value in (0.25, -0.25, 0.5, -1.75):
        assert rounded[vector == value].mean() == pytest.approx(value, abs=0.01)


def test_the_norm_that_is_paid_for_is_drawn_again_in_few_cases():
    vector = np.full(400, 0.5)
    most = rounded_norm(float(np.linalg.norm(vector)), len(vector))
    beyond = sum(
        np.linalg.norm(conditional_round(vector, 1.0, math.inf, source(seed))) > most for seed in range(400)
    )
    assert beyond / 400 <= math.exp(-0.5)


# The whole way.


def grid(**settings: object) -> Grid:
    known = {"size": 50, "clip": 1.0, "bound": 1.0, "noise_multiplier": 0.5, "honest": 4, "clients": 4}
    return Grid.of(**{"bits": 24} | known | settings)  # type: ignore[arg-type]


@given(
    st.lists(npst.arrays(np.float32, 50, elements=st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=4),
    st.sampled_from([12, 16, 24, 32]),
)
def test_a_sum_of_what_sites_send_is_the_sum_of_their_clipped_vectors_and_the_noise(vectors, bits):
    fine = grid(bits=bits)
    total = fine.ring.zeros(50)
    exact = np.zeros(50)
    for at, vector in enumerate(vectors):
        total += fine.encode(vector, 1, source(at))
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        exact += vector * min(1.0, 1.0 / norm if norm else 1.0)
    error = fine.decode(total, len(vectors)) - exact
    deviation = math.sqrt(len(vectors) * fine.variance) / fine.steps
    assert np.abs(error).max() <= 8 * deviation + (len(vectors) + 0.01) / fine.steps


def test_the_noise_on_a_sum_is_what_its_mechanism_says():
    fine = grid(size=20_000, noise_multiplier=2.0)
    total = fine.ring.zeros(20_000)
    for at in range(4):
        total += fine.encode(np.zeros(20_000, np.float32), 1, source(at))
    drawn = fine.decode(total, 4) * fine.steps
    mechanism = fine.mechanism(4)
    assert drawn.var() == pytest.approx(mechanism.variance, rel=0.05)
    assert mechanism.variance == pytest.approx((2.0 * fine.l2) ** 2)


def test_on_a_fine_grid_noise_costs_what_gaussian_noise_does():
    fine = grid(size=1000, noise_multiplier=1.0, bits=32)
    gaussian = epsilon_of([Gaussian(1.0)], 1e-5)
    assert gaussian <= epsilon_of([fine.mechanism(4)], 1e-5) <= 1.01 * gaussian
    assert fine.l2 == pytest.approx(fine.clip * fine.steps, rel=1e-3)


def test_steps_are_no_finer_than_is_of_use():
    """A table of the noise takes as much memory as its deviation has steps."""
    assert grid(bits=32).variance == pytest.approx(2.0**24, rel=1e-6)
    for size, noise_multiplier in ((10_000_000, 0.5), (30_000, 50.0), (1_000_000, 4.0)):
        long = grid(bits=32, size=size, noise_multiplier=noise_multiplier)
        assert long.l2 <= 1.01 * long.clip * long.steps, "rounding so many elements adds little to their norm"
        assert long.variance <= 2.0**30


def test_elements_of_a_rotated_vector_are_cut_to_what_the_ring_has_room_for():
    narrow = grid(bits=12, bound=0.25, clients=20, honest=10)
    assert narrow.steps > grid(bits=12, clients=20, honest=10).steps
    vector = np.zeros(50, np.float32)
    vector[:2] = 0.9, -0.05
    mean = np.zeros(50)
    for at in range(400):
        mean += narrow.decode(narrow.encode(vector, 1, source(at)), 1) / 400
    deviation = math.sqrt(narrow.variance / 400) / narrow.steps
    assert mean[0] == pytest.approx(0.25, abs=5 * deviation)
    assert mean[1] == pytest.approx(-0.05, abs=5 * deviation)


def test_a_sum_beyond_what_its_members_can_have_sent_is_no_sum():
    fine = grid(bits=16, clients=100, honest=100)
    total = fine.ring.zeros(50)
    total[7] = int(fine.largest_sum(3)) + 2
    with pytest.raises(RunError, match="beyond what its members may add"):
        fine.decode(total, 3)
    fine.decode(total, 100)


def test_private_updates_weigh_the_same():
    with pytest.raises(ValueError, match="weigh the same"):
        grid().encode(np.zeros(50, np.float32), 2, source())


def test_fewer_honest_sites_are_less_noise_and_a_larger_price():
    fine = grid()
    costs = [epsilon_of([fine.mechanism(honest)], 1e-5) for honest in (4, 3, 2, 1)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    assert grid(honest=2).mechanism(2).variance == pytest.approx((0.5 * grid(honest=2).l2) ** 2)
    assert isinstance(fine.mechanism(1), Skellam)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 8, "clients": 100, "honest": 100}, "no grid of 8 bits"),
        ({"honest": 0}, "honest"),
        ({"honest": 5}, "honest"),
        ({"bits": 33}, "bits"),
    ],
)
def test_a_sum_that_could_wrap_is_refused_when_it_is_configured(settings, says):
    with pytest.raises(ValueError, match=says):
        grid(**settings)


def test_a_grid_whose_sums_could_wrap_cannot_be_made():
    fine = grid(bits=16)
    with pytest.raises(ValueError, match="use fewer steps or more bits"):
        Grid(fine.size, fine.clip, fine.bound, fine.steps, fine.variance, 50, fine.bits)


@pytest.mark.parametrize("name", ["size", "clip", "bound", "steps", "variance", "clients"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_grid_of_numbers_out_of_range_is_none(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number above 0"):
        replace(grid(), **{name: value})


def test_a_grid_may_be_as_narrow_and_as_noisy_as_its_sums_and_a_table_of_its_noise_allow():
    narrow = Grid(size=1, clip=1.0, bound=1.0, steps=22.0, variance=1.0, clients=1, bits=8)
    assert narrow.largest_sum(1) == 127
    with pytest.raises(ValueError, match="use fewer steps or more bits"):
        replace(narrow, steps=23.0)  # 128
    for bits in (7, 33):
        with pytest.raises(ValueError, match=f"bits: expected 8 to 32, found {bits}"):
            replace(narrow, bits=bits)
    noisy = replace(narrow, variance=2.0**30, bits=32)
    with pytest.raises(ValueError, match="variance: expected at most 2\\^30"):
        replace(noisy, variance=math.nextafter(2.0**30, math.inf))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_noisy_sum_may_be_as_large_as_its_members_can_make_it_and_no_larger(sign: int):
    wide = Grid(size=2, clip=1.0, bound=1.0, steps=22.0, variance=1.0, clients=4, bits=16)
    assert wide.largest_sum(1) == 127
    assert wide.decode(wide.ring.of(np.array([0, sign * 127])), 1)[1] == sign * 127 / 22
    with pytest.raises(RunError, match="beyond what its members may add"):
        wide.decode(wide.ring.of(np.array([0, sign * 128])), 1)


def test_the_sum_of_absolute_values_is_bounded_by_what_is_less_of_two():
    coarse = Grid(size=10_000, clip=1.0, bound=1.0, steps=0.01, variance=1.0, clients=4)
    assert coarse.l1 == coarse.l2**2 < math.sqrt(coarse.size) * coarse.l2
    fine = Grid(size=4, clip=1.0, bound=1.0, steps=100.0, variance=1.0, clients=4)
    assert fine.l1 == 2 * fine.l2 < fine.l2**2


def test_one_honest_site_is_enough_and_has_all_of_the_noise_to_add():
    alone = grid(honest=1)
    assert alone.variance == pytest.approx((0.5 * alone.l2) ** 2)


@pytest.mark.parametrize(
    "bad", [np.full(50, np.nan, np.float32), np.full(50, np.inf, np.float32), np.ones(3, np.float32)]
)
def test_what_is_not_a_finite_vector_of_its_size_is_not_encoded(bad):
    with pytest.raises(ValueError, match="expected"):
        grid().encode(bad, 1, source())


@pytest.mark.parametrize("vector", [np.zeros(50, np.float32), np.ones(50, np.float32)], ids=["zero", "equal"])
def test_vectors_of_zeros_and_of_equal_elements_are_noised_like_any_other(vector):
    sent = [tuple(grid().encode(vector, 1, source(at))) for at in range(2)]
    assert sent[0] != sent[1]
    assert len(set(sent[0])) > 10


def test_a_grid_so_coarse_that_norms_are_below_a_step_has_a_price_too():
    coarse = Grid(1, 1.0, 1.0, 1e-9, 1.0, 3)
    assert coarse.l2 < 1
    assert coarse.mechanism(2) == Skellam(2.0, coarse.l2, coarse.l2)
