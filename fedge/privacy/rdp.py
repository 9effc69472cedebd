"""Rényi differential privacy (Mironov 2017): what the site's gate decides by, in milliseconds and without scipy.

A curve is float64[len(ORDERS)]: an upper bound on the Rényi divergence at each order. Curves of
independent releases add up. Statements to people use a tighter accountant: `fedge.privacy.pld`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedge.privacy.mechanism import Gaussian, Mechanism, SampledGaussian, Skellam, scaled

Curve = npt.NDArray[np.float64]

ORDERS: Curve = np.array(
    [1 + tenths / 10 for tenths in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
)
"""The orders that dp-accounting uses, so that both give the same numbers."""

_BINOMIAL_FROM = 64
"""From this order on a sum of binomial terms; below it an integral, which takes any order."""
_SPLIT = (60, 99, 120, 135)
"""Orders that share an integral's points: the larger the order, the further its mass reaches."""
_MOST_STEPS = 12
"""Points a sigma of an integral, at most: see `_integrals`."""
_TAIL_SIGMAS = 14.0
_MAX_POINTS = 40_000
_ROUNDING = 2.0**-49
"""More than the sums' rounding errors an order: added, so that a divergence near 1e-16 is not under-reported."""


def curve(mechanism: Mechanism) -> Curve:
    """The divergence of a mechanism at every order; infinite where it has no bound.

    Sources: Mironov 2017, Corollary 3 (Gaussian); Mironov, Talwar and Zhang 2019, section 3 (sampled);
    Agarwal, Kairouz and Liu 2021, Theorem 3.5 (Skellam).
    """
    return mechanism.count * _single(scaled(mechanism, 1))


def total(mechanisms: Iterable[Mechanism]) -> Curve:
    """The curve of all these releases together."""
    out: Curve = np.zeros(len(ORDERS))
    for mechanism in mechanisms:
        out = out + curve(mechanism)
    return out


def epsilon(divergence: Curve, delta: float) -> float:
    """The smallest epsilon that the curve proves at `delta` (Canonne, Kamath and Steinke 2020, Prop. 12).

    Raises:
        ValueError: `delta` is not in (0, 1), or the curve is not one.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, found {delta}")
    if divergence.shape != ORDERS.shape or np.isnan(divergence).any() or (divergence < 0).any():
        raise ValueError("expected a curve of divergences that are 0 or more at every order, found another")
    if not divergence.any():
        return 0.0
    best = np.min(divergence + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1))
    # A divergence so small that it bounds the total variation distance by delta (Bretagnolle and Huber).
    if delta**2 + np.expm1(-divergence).max() > 0:
        return 0.0
    return max(0.0, float(best))


def epsilon_of(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The epsilon of these releases together at `delta`."""
    return epsilon(total(mechanisms), delta)


@lru_cache(maxsize=256)
def _single(mechanism: Mechanism) -> Curve:
    match mechanism:
        case Gaussian(sigma):
            out = _gaussian(sigma)
        case SampledGaussian(sigma, rate):
            out = _gaussian(sigma) if rate == 1 else _sampled(sigma, rate)
        case Skellam(variance, l2, l1):
            out = _skellam(variance, l2, l1)
    out.flags.writeable = False
    return out


def _gaussian(sigma: float) -> Curve:
    return ORDERS / (2 * sigma**2)


def _skellam(variance: float, l2: float, l1: float) -> Curve:
    """The theorem is for whole orders. Between them (alpha - 1) times the divergence is convex in alpha
    (van Erven and Harremoes 2014, Corollary 2), so that the chord is a bound; it is 0 at alpha = 1.
    """
    below, above = np.floor(ORDERS), np.ceil(ORDERS)
    part = ORDERS - below
    chord = (1 - part) * _skellam_cumulant(below, variance, l2, l1)
    chord += part * _skellam_cumulant(above, variance, l2, l1)
    out: Curve = chord / (ORDERS - 1)
    return out


def _skellam_cumulant(orders: Curve, variance: float, l2: float, l1: float) -> Curve:
    square = l2**2
    extra = ((2 * orders - 1) * square + 6 * l1) / (4 * variance**2)
    out: Curve = (orders - 1) * (
        orders * square / (2 * variance) + np.minimum(extra, 3 * l1 / (2 * variance))
    )
    return out


def _sampled(sigma: float, rate: float) -> Curve:
    """log E[((1-q) + q exp((2z-1)/(2 sigma^2)))^alpha] / (alpha-1), z ~ N(0, sigma^2)."""
    small = ORDERS < _BINOMIAL_FROM
    parts = [_integrals(sigma, rate, orders) for orders in np.split(ORDERS[small], _SPLIT)]
    logs = [_binomial(sigma, rate, int(order)) for order in ORDERS[~small]]
    cumulants = np.concatenate((*parts, logs))
    return (np.maximum(cumulants, 0.0) + _ROUNDING * ORDERS) / (ORDERS - 1)


def _integrals(sigma: float, rate: float, orders: Curve) -> Curve:
    """By the trapezoidal rule, whose error falls exponentially with the number of points: the integrand is analytic
    in a strip, as wide as the ratio has no zero, which is pi sigma to both sides (Trefethen and Weideman 2014,
    theorem 5.1). A step of sigma / 4 leaves exp(-8 pi^2) of it, and one of 1/5 no more of the Gaussian.

    In units of sigma the integrand has its mass between 0 (the Gaussian's) and alpha / sigma (that of the
    ratio's alpha-th power).
    """
    low, high = -_TAIL_SIGMAS, orders[-1] / sigma + _TAIL_SIGMAS
    points = math.ceil((high - low) * min(max(5.0, 4.0 / sigma), _MOST_STEPS)) + 1
    if points > _MAX_POINTS:  # noise so small that it proves next to nothing
        return np.full(len(orders), math.inf)
    z, step = np.linspace(low, high, points, retstep=True)
    log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1 / sigma) / (2 * sigma))
    exponents = np.outer(orders, log_ratio) - z * z / 2
    peaks = exponents.max(axis=1)
    exponents -= peaks[:, np.newaxis]
    masses = np.exp(exponents, out=exponents).sum(axis=1) * float(step)
    out: Curve = peaks + np.log(masses) - 0.5 * math.log(2 * math.pi)
    return out


def _binomial(sigma: float, rate: float, order: int) -> float:
    """log sum_k C(alpha, k) (1-q)^(alpha-k) q^k exp((k^2 - k) / (2 sigma^2)), for whole orders."""
    k = np.arange(order + 1, dtype=np.float64)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, order + 1)))))
    choose = log_factorial[order] - log_factorial - log_factorial[::-1]
    terms = choose + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * sigma**2)
    return float(np.logaddexp.reduce(terms))
