"""From an epsilon to the noise that buys it, and back; by the accountant that the gate decides by."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedge.privacy.mechanism import Gaussian, SampledGaussian
from fedge.privacy.rdp import Curve, curve, epsilon

MAX_NOISE_MULTIPLIER = 1e4
_MIN_NOISE_MULTIPLIER = 0.05
_RELATIVE_TOLERANCE = 1e-3
_NUDGE = 4e-4


def releases(noise_multiplier: float, *, sampling_rate: float, count: int) -> Gaussian | SampledGaussian:
    """`count` noisy releases of everybody's data (rate 1), or of a Poisson sample of it."""
    if sampling_rate == 1:
        return Gaussian(noise_multiplier, count)
    return SampledGaussian(noise_multiplier, sampling_rate, count)


def noise_multiplier_for(
    target: float, delta: float, *, sampling_rate: float = 1.0, count: int, spent: Curve | None = None
) -> float:
    """The smallest noise multiplier (to 0.1 %, never too small; 0.05 at least) with which `count` releases
    stay within `target` epsilon at `delta`, `spent` included.

    Raises:
        ValueError: no noise up to 10,000 times the clip does, or a number is out of its range.
    """
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"epsilon: expected a finite number above 0, found {target}")

    def cost(sigma: float) -> float:
        divergence = curve(releases(sigma, sampling_rate=sampling_rate, count=count))
        return epsilon(divergence if spent is None else divergence + spent, delta)

    before = 0.0 if spent is None else epsilon(spent, delta)
    if before > target:
        raise ValueError(
            f"epsilon {before:.4g} at delta {delta:g} is spent already, which is more than {target:g}; no noise "
            "makes that less"
        )
    found = least_noise(cost, target)
    if found is None:
        raise ValueError(
            f"no noise buys epsilon {target:g} at delta {delta:g} for {count} releases; ask for fewer "
            "rounds or steps, or for a larger epsilon"
        )
    return found


def least_noise(cost: Callable[[float], float], target: float) -> float | None:
    """The smallest noise multiplier (to 0.1 %, never too small; 0.05 at least) that costs at most `target`; None if
    not even 10,000 does. `cost` falls as noise grows."""
    low, high = _bracket(cost, target)
    if high is None:
        return None
    return high[0] if low is None else _narrowed(cost, target, low, high)


Point = tuple[float, float]
"""A noise multiplier and the epsilon that it costs."""


def _bracket(cost: Callable[[float], float], target: float) -> tuple[Point | None, Point | None]:
    """Two points, with too little noise and with enough; the first is None where the least that there is is
    enough, the second where the most is not. Begins at 1: the cost of curves grows as noise falls."""
    at = (1.0, cost(1.0))
    if at[1] <= target:
        while at[0] > _MIN_NOISE_MULTIPLIER:
            less = max(at[0] / 2, _MIN_NOISE_MULTIPLIER)
            found = (less, cost(less))
            if found[1] > target:
                return found, at
            at = found
        return None, at
    while at[0] < MAX_NOISE_MULTIPLIER:
        more = min(2 * at[0], MAX_NOISE_MULTIPLIER)
        found = (more, cost(more))
        if found[1] <= target:
            return at, found
        at = found
    return at, None


def _narrowed(cost: Callable[[float], float], target: float, low: Point, high: Point) -> float:
    """The noise multiplier between the two, to the tolerance: where a power law through both would have the
    target, a little to either side of it, so that both ends close in; halving where that does not help."""
    goal = math.log(target)
    while high[0] / low[0] > 1 + _RELATIVE_TOLERANCE:
        width = math.log(high[0] / low[0])
        left, right = (math.log(max(each[1], 1e-300)) for each in (low, high))
        share = (left - goal) / (left - right) if math.isfinite(left) and left > right else 0.5
        guess = low[0] * math.exp(width * min(max(share, 0.05), 0.95))
        for nudge in (1 + _NUDGE, 1 - _NUDGE):
            at = min(max(guess * nudge, low[0]), high[0])
            if not low[0] < at < high[0]:
                continue
            found = (at, cost(at))
            low, high = (low, found) if found[1] <= target else (found, high)
        if math.log(high[0] / low[0]) > width / 2:
            middle = math.sqrt(low[0] * high[0])
            found = (middle, cost(middle))
            low, high = (low, found) if found[1] <= target else (found, high)
    return high[0]
