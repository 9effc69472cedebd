"""Statements to people: the tightest valid epsilon, by privacy loss distributions (dp-accounting).

Tighter than `fedge.privacy.rdp` by a tenth or so, and a hundred times slower; also the independent
accountant against which the ledger's own numbers are verified.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from fedge.errors import ConfigError
from fedge.privacy.mechanism import Gaussian, Mechanism, SampledGaussian, Skellam, merged
from fedge.privacy.rdp import ORDERS, Curve, epsilon, epsilon_of

Accountant = Literal["PLD", "RDP"]

_MAX_EPSILON = 50.0
"""Beyond it nothing is protected, and the distribution of losses would fill gigabytes for minutes."""


def statement(mechanisms: Iterable[Mechanism], delta: float) -> tuple[float, Accountant]:
    """`(epsilon, accountant)`: PLD where every mechanism has a distribution of losses, else RDP; so, too,
    where RDP finds more than 50.

    Raises:
        ConfigError: dp-accounting is not installed.
        ValueError: `delta` is not in (0, 1).
    """
    return _stated(merged(mechanisms), delta)


@lru_cache(maxsize=256)
def _stated(releases: tuple[Mechanism, ...], delta: float) -> tuple[float, Accountant]:
    """It takes seconds, and sites that have done the same have spent the same."""
    bound = epsilon_of(releases, delta)  # valid too, and checks delta
    if not 0 < bound <= _MAX_EPSILON or any(isinstance(release, Skellam) for release in releases):
        return bound, "RDP"
    library = _library()
    accountant = library.pld.PLDAccountant()
    accountant.compose(event_of(releases))
    tight = float(accountant.get_epsilon(delta))
    return (tight, "PLD") if tight <= bound else (bound, "RDP")


def reference_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The RDP epsilon by adaptive quadrature of the definition (QUADPACK), order by order: slow, and independent of
    the formulas in `fedge.privacy.rdp`. dp-accounting's own series fails to converge at large sampling rates.

    Raises:
        ConfigError: scipy, which comes with dp-accounting, is not installed.
        ValueError: a mechanism that has no loss distribution, or `delta` is not in (0, 1).
    """
    divergence: Curve = np.zeros(len(ORDERS))
    for mechanism in merged(mechanisms):
        match mechanism:
            case Gaussian(sigma, count):
                divergence = divergence + count * _divergences(sigma, 1.0)
            case SampledGaussian(sigma, rate, count):
                divergence = divergence + count * _divergences(sigma, rate)
            case Skellam():
                raise ValueError(f"{mechanism.kind}: has no quadrature here; use its RDP curve")
    return epsilon(divergence, delta)


@lru_cache(maxsize=256)
def _divergences(sigma: float, rate: float) -> Curve:
    try:
        from scipy.integrate import quad
    except ModuleNotFoundError as error:
        raise ConfigError(f"this needs {error.name}: pip install 'fedge[privacy]'") from error

    def log_integrand(z: float, order: float) -> float:
        ratio = (
            np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
            if rate < 1
            else ((2 * z - 1) / (2 * sigma**2))
        )
        return float(order * ratio - z * z / (2 * sigma**2))

    found = []
    for order in ORDERS:
        low, high = -12 * sigma, order + 12 * sigma
        peak = max(log_integrand(z, order) for z in np.linspace(low, high, 400))
        mass, _ = quad(
            lambda z, order, peak: math.exp(log_integrand(z, order) - peak),
            low,
            high,
            args=(order, peak),
            points=(0.0, order),
            limit=400,
            epsabs=0,
            epsrel=1e-9,
        )
        found.append((peak + math.log(mass) - math.log(sigma * math.sqrt(2 * math.pi))) / (order - 1))
    out: Curve = np.maximum(np.array(found), 0.0)
    return out


def event_of(mechanisms: Iterable[Mechanism]) -> Any:
    """The releases as a `dp_accounting.DpEvent`.

    Raises:
        ConfigError: dp-accounting is not installed.
        ValueError: a mechanism that has no event there.
    """
    events = _library().dp_event
    parts = []
    for mechanism in mechanisms:
        match mechanism:
            case Gaussian(sigma, count):
                one = events.GaussianDpEvent(sigma)
            case SampledGaussian(sigma, rate, count):
                one = events.PoissonSampledDpEvent(rate, events.GaussianDpEvent(sigma))
            case Skellam():
                raise ValueError(f"{mechanism.kind}: has no event in dp-accounting; use its RDP curve")
        parts.append(events.SelfComposedDpEvent(one, count))
    return events.ComposedDpEvent(parts)


def _library() -> Any:
    try:
        import dp_accounting  # scipy beneath it takes a second and 80 MB: only where a statement is made
        import dp_accounting.pld
        import dp_accounting.rdp
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a statement of privacy needs {error.name}: pip install 'fedge[privacy]'"
        ) from error
    return dp_accounting
