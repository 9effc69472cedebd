"""Mechanisms: what was done for privacy, as data that an accountant can price and a ledger can keep.

Every one is a number of releases under add-or-remove-one adjacency, in units in which the sensitivity of
a release is 1. What a mechanism does not say it does not do: there is no "unknown" that costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from fedge.config import nearest, shown

MAX_COUNT = 2**40
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e30
"""What a mechanism's numbers lie between, so that no square of one overflows or vanishes in an accountant."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """`count` releases with Gaussian noise of standard deviation `noise_multiplier` times the sensitivity.

    Raises:
        ValueError: a number is not finite or out of its range.
    """

    kind: ClassVar[Literal["gaussian"]] = "gaussian"

    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        _check_positive("noise_multiplier", self.noise_multiplier)
        _check_count(self.count)

    def __str__(self) -> str:
        return f"{self.count} x Gaussian, noise multiplier {self.noise_multiplier:g}"


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """`count` releases, each of a Gaussian on a Poisson sample: every example is in it with probability
    `sampling_rate`, independently (Abadi et al. 2016; Mironov, Talwar and Zhang 2019).

    Raises:
        ValueError: a number is not finite or out of its range.
    """

    kind: ClassVar[Literal["sampled_gaussian"]] = "sampled_gaussian"

    noise_multiplier: float
    sampling_rate: float
    count: int = 1

    def __post_init__(self) -> None:
        _check_positive("noise_multiplier", self.noise_multiplier)
        _check_positive("sampling_rate", self.sampling_rate)
        if self.sampling_rate > 1:
            raise ValueError(f"sampling_rate: expected at most 1, found {self.sampling_rate}")
        _check_count(self.count)

    def __str__(self) -> str:
        return (
            f"{self.count} x Gaussian, noise multiplier {self.noise_multiplier:g}, "
            f"on a Poisson sample of rate {self.sampling_rate:.4g}"
        )


@dataclass(frozen=True, slots=True)
class Skellam:
    """`count` releases on the integer grid with Skellam noise of total variance `variance`, for a query
    whose sensitivities are `l2` and `l1` grid steps (Agarwal, Kairouz and Liu 2021).

    Raises:
        ValueError: a number is not finite or out of its range.
    """

    kind: ClassVar[Literal["skellam"]] = "skellam"

    variance: float
    l2: float
    l1: float
    count: int = 1

    def __post_init__(self) -> None:
        for name in ("variance", "l2", "l1"):
            _check_positive(name, getattr(self, name))
        if self.l1 < self.l2:
            raise ValueError(f"l1: expected at least l2 = {self.l2}, found {self.l1}")
        _check_count(self.count)

    def __str__(self) -> str:
        return f"{self.count} x Skellam, variance {self.variance:g} on sensitivities {self.l2:g}, {self.l1:g}"


Mechanism = Gaussian | SampledGaussian | Skellam
M = TypeVar("M", bound=Mechanism)

_KINDS: dict[str, type[Gaussian] | type[SampledGaussian] | type[Skellam]] = {
    kind.kind: kind for kind in (Gaussian, SampledGaussian, Skellam)
}


def scaled(mechanism: M, count: int) -> M:
    """The same mechanism, released `count` times in all."""
    return replace(mechanism, count=count)


def coarser(mechanism: Mechanism, factor: float) -> Mechanism:
    """The same noise on a query of `factor` times the sensitivity (which must be 1 or more)."""
    match mechanism:
        case Skellam():
            return replace(mechanism, l2=mechanism.l2 * factor, l1=mechanism.l1 * factor)
        case Gaussian() | SampledGaussian():
            return replace(mechanism, noise_multiplier=mechanism.noise_multiplier / factor)


def merged(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """The same releases with equal mechanisms counted together, in order of their first appearance."""
    counts: dict[Mechanism, int] = {}
    for mechanism in mechanisms:
        one = scaled(mechanism, 1)
        counts[one] = counts.get(one, 0) + mechanism.count
    return tuple(scaled(one, count) for one, count in counts.items())


def to_table(mechanism: Mechanism) -> dict[str, Any]:
    """A mechanism as plain values, `kind` first."""
    return {"kind": mechanism.kind, **asdict(mechanism)}


def from_table(table: Mapping[str, Any]) -> Mechanism:
    """The mechanism that `to_table` described.

    Raises:
        ValueError: it is of an unknown kind, or its fields are not exactly those of its kind, or not
            numbers in their ranges.
    """
    name = table.get("kind")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"unknown mechanism {shown(name)}; {nearest(shown(name), _KINDS)}")
    expected = {field.name for field in fields(kind)}
    found = table.keys() - {"kind"}
    if found != expected:
        raise ValueError(
            f"{name}: expected the fields {sorted(expected)}, found {shown(sorted(map(str, found)))}"
        )
    return kind(**{key: value for key, value in table.items() if key != "kind"})


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, found {shown(value)}")
    if not MIN_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"{name}: expected a number from 1e-30 to 1e30, found {shown(value)}")


def _check_count(count: object) -> None:
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        raise ValueError(f"count: expected a whole number from 1 to 2^40, found {shown(count)}")
