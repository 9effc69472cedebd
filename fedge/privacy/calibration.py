"""From an epsilon to the noise that buys it, and back; by the accountant that the gate decides by."""

from __future__ import annotations

import math

from fedge.privacy.mechanism import Gaussian, SampledGaussian
from fedge.privacy.rdp import Curve, curve, epsilon

MAX_NOISE_MULTIPLIER = 1e4
_MIN_NOISE_MULTIPLIER = 0.05
_RELATIVE_TOLERANCE = 1e-3


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
    low, high = _MIN_NOISE_MULTIPLIER, 1.0
    while cost(high) > target:
        if high == MAX_NOISE_MULTIPLIER:
            raise ValueError(
                f"no noise buys epsilon {target:g} at delta {delta:g} for {count} releases; ask for fewer "
                "rounds or steps, or for a larger epsilon"
            )
        low, high = high, min(2 * high, MAX_NOISE_MULTIPLIER)
    if low < 1 and cost(low) <= target:
        return low
    while high / low > 1 + _RELATIVE_TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high
