"""Statements to people: the tightest valid epsilon, by privacy loss distributions (dp-accounting).

Tighter than `fedge.privacy.rdp` by a tenth or so, and a hundred times slower; also the independent
accountant against which the ledger's own numbers are verified.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from fedge.errors import ConfigError
from fedge.privacy.mechanism import Gaussian, Mechanism, SampledGaussian, Skellam, merged
from fedge.privacy.rdp import epsilon_of

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
    releases = merged(mechanisms)
    bound = epsilon_of(releases, delta)  # valid too, and checks delta
    if not 0 < bound <= _MAX_EPSILON or any(isinstance(release, Skellam) for release in releases):
        return bound, "RDP"
    library = _library()
    accountant = library.pld.PLDAccountant()
    accountant.compose(event_of(releases))
    tight = float(accountant.get_epsilon(delta))
    return (tight, "PLD") if tight <= bound else (bound, "RDP")


def reference_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The RDP epsilon by dp-accounting, which shares no code with `fedge.privacy.rdp`.

    Raises:
        ConfigError: dp-accounting is not installed.
        ValueError: a mechanism that it does not know.
    """
    accountant = _library().rdp.RdpAccountant()
    accountant.compose(event_of(merged(mechanisms)))
    return float(accountant.get_epsilon(delta))


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
