"""How private something is at most, found out by attacking it: lower bounds on epsilon at 95 % confidence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
Numbers = npt.NDArray[np.float64]


def by_threshold(absent: Numbers, present: Numbers, delta: float) -> float:
    """From many independent releases without and with a canary: a test that says "present" above some threshold
    is right at most e^epsilon times as often as it is wrong, and delta (Kairouz, Oh and Viswanath 2015).

    Thresholds are chosen on one half of the releases and judged, with Clopper and Pearson's bounds, on the other.
    """
    half = len(absent) // 2
    candidates = np.quantile(present[:half], np.linspace(0.5, 1 - 30 / half, 200))
    best = max(candidates, key=lambda each: _bound(absent[:half], present[:half], each, delta))
    return _bound(absent[half:], present[half:], best, delta)


def _bound(absent: Numbers, present: Numbers, threshold: float, delta: float) -> float:
    wrong, right = int((absent > threshold).sum()), int((present > threshold).sum())
    tail = (1 - CONFIDENCE) / 2
    most_wrong = stats.beta.ppf(1 - tail, wrong + 1, len(absent) - wrong)
    least_right = stats.beta.ppf(tail, right, len(present) - right + 1) if right else 0.0
    return math.log(max((least_right - delta) / most_wrong, 1e-12))


def by_one_run(scores: Numbers, included: npt.NDArray[np.bool_], delta: float) -> float:
    """From one run in which each of many canaries was included with probability one half: guesses on those with the
    highest and the lowest scores (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run",
    theorem 5.2). Over some numbers of guesses, with the confidence shared among them.
    """
    order = np.argsort(scores)
    tries = [count for count in (10, 20, 50, 100, 200, 500) if 2 * count <= len(scores)]
    bounds = [0.0]
    for count in tries:
        right = int((~included[order[:count]]).sum() + included[order[-count:]].sum())
        doubt = (1 - CONFIDENCE) / len(tries)
        bounds.append(
            _largest(lambda epsilon: _p_value(len(scores), 2 * count, right, epsilon, delta) < doubt)
        )
    return max(bounds)


def _p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, if the run were (epsilon, delta)-private."""
    share = 1 / (1 + math.exp(-epsilon))
    exactly = stats.binom.pmf(np.arange(right, -1, -1), guesses, share)
    slack = float((np.cumsum(exactly[1:]) / np.arange(1, right + 1)).max()) if right else 0.0
    return float(stats.binom.sf(right - 1, guesses, share)) + 2 * canaries * delta * slack


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest epsilon that is refuted; 0 if none is."""
    low, high = 0.0, 40.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
