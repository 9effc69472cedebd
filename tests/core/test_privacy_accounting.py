"""Accountants: reference numbers, independent implementations, and the laws between them."""

from __future__ import annotations

import math

import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.privacy import rdp
from fedge.privacy.calibration import noise_multiplier_for, releases
from fedge.privacy.mechanism import (
    Gaussian,
    Mechanism,
    SampledGaussian,
    Skellam,
    from_table,
    merged,
    scaled,
    to_table,
)
from fedge.privacy.pld import event_of, reference_rdp, statement

DELTA = 1e-5
ANCHORS = [
    (SampledGaussian(1.1, 256 / 60000, 14062), 2.59656, 2.38169),
    (SampledGaussian(1.0, 0.01, 1000), 2.10137, 1.82824),
    (Gaussian(10.0, 100), 4.72851, 4.37718),
]


@pytest.mark.parametrize(("mechanism", "by_rdp", "by_pld"), ANCHORS)
def test_reference_numbers_are_hit(mechanism, by_rdp, by_pld):
    assert rdp.epsilon_of([mechanism], DELTA) == pytest.approx(by_rdp, abs=1e-5)
    epsilon, accountant = statement([mechanism], DELTA)
    assert (epsilon, accountant) == (pytest.approx(by_pld, abs=1e-5), "PLD")


def exact_gaussian(epsilon: float, sigma: float) -> float:
    """The delta of a Gaussian of sensitivity 1 (Balle and Wang 2018, Theorem 8)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, b = 1 / (2 * sigma), epsilon * sigma
    return phi(a - b) - math.exp(epsilon) * phi(-a - b)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("count", [1, 50])
def test_exact_is_at_most_pld_is_at_most_rdp(sigma, count):
    mechanism = Gaussian(sigma * math.sqrt(count), count)  # as one of sigma
    by_pld, by_rdp = statement([mechanism], DELTA)[0], rdp.epsilon_of([mechanism], DELTA)
    assert exact_gaussian(by_pld, sigma) <= DELTA * (1 + 1e-6)
    assert exact_gaussian(by_pld * 0.999, sigma) > DELTA
    assert by_pld <= by_rdp
    if (sigma, count) == (1.0, 50):
        assert by_pld == pytest.approx(4.377178095681137, abs=1e-4)


@pytest.mark.parametrize(
    ("sigma", "rate", "count"), [(1.0, 0.01, 1000), (0.8, 0.1, 20), (5.0, 0.3, 500), (2.0, 0.001, 10_000)]
)
def test_opacus_agrees_and_its_prv_bound_lies_between_pld_and_rdp(sigma, rate, count):
    from opacus.accountants import PRVAccountant, RDPAccountant

    mechanism = SampledGaussian(sigma, rate, count)
    others = {}
    for kind in (RDPAccountant, PRVAccountant):
        accountant = kind()
        accountant.history = [(sigma, rate, count)]
        others[kind] = accountant
    ours = rdp.epsilon_of([mechanism], DELTA)
    theirs = others[RDPAccountant].get_epsilon(delta=DELTA, alphas=list(rdp.ORDERS))
    assert ours == pytest.approx(theirs, rel=1e-4)
    upper = others[PRVAccountant].get_epsilon(delta=DELTA, eps_error=0.01)
    assert statement([mechanism], DELTA)[0] <= upper + 1e-3
    assert upper <= ours + 0.01


mechanisms = st.one_of(
    st.builds(Gaussian, st.floats(0.5, 50), st.integers(1, 100)),
    st.builds(SampledGaussian, st.floats(0.7, 20), st.floats(1e-4, 0.5), st.integers(1, 1000)),
)


@settings(max_examples=6, deadline=None)
@given(st.lists(mechanisms, min_size=1, max_size=2))
def test_the_definition_integrated_by_somebody_else_agrees_on_any_history(history):
    ours = rdp.epsilon_of(history, DELTA)
    assert reference_rdp(history, DELTA) == pytest.approx(ours, abs=1e-3, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.7, 1.3, 6.0])
@pytest.mark.parametrize("rate", [1e-4, 0.003, 0.05, 1.0])
def test_dp_accounting_agrees(sigma, rate):
    """At larger rates its series does not converge at some orders, which it leaves out: a wider bound."""
    history = [releases(sigma, sampling_rate=rate, count=300)]
    accountant = RdpAccountant()
    accountant.compose(event_of(history))
    ours, theirs = rdp.epsilon_of(history, DELTA), accountant.get_epsilon(DELTA)
    assert ours <= theirs * (1 + 1e-4)
    if rate != 0.05:
        assert ours == pytest.approx(theirs, rel=1e-4)


@given(st.lists(mechanisms, min_size=1, max_size=6))
def test_equal_mechanisms_counted_together_cost_the_same(history):
    doubled = [*history, *history]
    assert len(merged(doubled)) <= len(history)
    assert rdp.epsilon_of(merged(doubled), DELTA) == pytest.approx(rdp.epsilon_of(doubled, DELTA))
    assert rdp.epsilon_of(doubled, DELTA) >= rdp.epsilon_of(history, DELTA)


@pytest.mark.parametrize("rate", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_calibrated_noise_costs_the_target_and_less_noise_more(rate, target):
    sigma = noise_multiplier_for(target, DELTA, sampling_rate=rate, count=40)

    def cost(noise: float) -> float:
        return rdp.epsilon_of([releases(noise, sampling_rate=rate, count=40)], DELTA)

    assert cost(sigma) <= target < cost(sigma * 0.99)


def test_what_no_noise_can_buy_is_refused():
    with pytest.raises(ValueError, match="no noise buys"):
        noise_multiplier_for(1e-5, DELTA, count=10**6)


def test_nothing_costs_nothing_and_noise_of_next_to_nothing_proves_nothing():
    assert rdp.epsilon_of([], DELTA) == 0
    assert rdp.epsilon_of([SampledGaussian(1e-3, 0.5, 1)], DELTA) > 1e6


def test_a_skellam_release_costs_nearly_what_the_gaussian_of_its_variance_does():
    found = rdp.epsilon_of([Skellam(100.0**2, 10.0, 100.0)], DELTA)
    assert rdp.epsilon_of([Gaussian(10.0)], DELTA) <= found <= 1.1 * rdp.epsilon_of([Gaussian(10.0)], DELTA)
    assert statement([Skellam(100.0**2, 10.0, 100.0)], DELTA) == (found, "RDP")


# Mechanisms as data.


@given(st.one_of(mechanisms, st.builds(Skellam, st.floats(1, 1e6), st.just(2.0), st.floats(2, 9))))
def test_a_mechanism_is_found_again_in_its_table(mechanism: Mechanism):
    assert from_table(to_table(mechanism)) == mechanism
    assert scaled(mechanism, 3).count == 3


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "laplace"},
        {"kind": None},
        {"extra": 1},
        {"noise_multiplier": 0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": "1"},
        {"noise_multiplier": True},
        {"sampling_rate": 1.5},
        {"sampling_rate": 0.0},
        {"count": 0},
        {"count": 1.0},
        {"count": True},
        {"count": 2**41},
    ],
)
def test_anything_unknown_is_an_error_and_never_free(change):
    with pytest.raises(ValueError):
        from_table(to_table(SampledGaussian(1.0, 0.1, 10)) | change)


def test_a_missing_field_is_an_error():
    table = to_table(Gaussian(1.0))
    del table["count"]
    with pytest.raises(ValueError, match="expected the fields"):
        from_table(table)
