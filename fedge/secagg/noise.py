"""Noise that the members of a secure sum add themselves: how much, so that the sum is private for each of them.

It is reckoned with the members that are left in the smallest sum and are not in league with the coordinator, of whom
the protocol itself bears as many as a third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedge.privacy.calibration import least_noise
from fedge.privacy.mechanism import scaled
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.terms import Terms
from fedge.secagg.grid import Grid
from fedge.secagg.session import needed


@dataclass(frozen=True, slots=True)
class Noise:
    """What each member does to its update, of which `size` elements are protected (the others are zero).

    `steps` grid steps are one unit of the update, and the member's own noise has a variance of `variance` steps^2.

    Raises:
        ValueError: a number is out of range.
    """

    size: int
    steps: float
    variance: float

    def __post_init__(self) -> None:
        for name in ("size", "steps", "variance"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")


def honest_of(least: int, most: int, threshold_ppm: int) -> int:
    """How many members have added noise that nobody else knows, in any sum of a session of `least` to `most`
    members: those that must come to its end, less the third that may tell the coordinator theirs."""
    return min(
        max(needed(members, threshold_ppm), least) - members // 3 for members in range(least, most + 1)
    )


def noise_for(terms: Terms, size: int, *, honest: int, clients: int, bound: float, bits: int) -> Noise:
    """The noise of a run's terms, as they give it or as little as keeps their epsilon in all participations.

    Raises:
        ValueError: no noise does, or it does not fit in the bits.
    """

    def grid(noise_multiplier: float) -> Grid:
        return Grid.of(
            size=size,
            clip=terms.clip,
            bound=bound,
            noise_multiplier=noise_multiplier,
            honest=honest,
            clients=clients,
            bits=bits,
        )

    def cost(noise_multiplier: float) -> float:
        one = grid(noise_multiplier).mechanism(honest)
        return epsilon_of((scaled(one, terms.participations),), terms.delta)

    noise_multiplier = terms.noise_multiplier
    if noise_multiplier is None:
        assert terms.epsilon is not None  # one of the two is given
        noise_multiplier = least_noise(cost, terms.epsilon)
        if noise_multiplier is None:
            raise ValueError(
                f"no noise keeps epsilon {terms.epsilon:g} at delta {terms.delta:g} over {terms.participations} "
                "rounds; ask for fewer rounds, or for a larger epsilon"
            )
    chosen = grid(noise_multiplier)
    return Noise(size, chosen.steps, chosen.variance)
