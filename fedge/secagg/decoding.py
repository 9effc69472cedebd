"""Seeds from shares of which some may be wrong.

The first `threshold` shares are tried first: as a rule all are right, and every secret is checked against what its
owner has published. Where that fails, polynomials are sought on which most shares lie (Welch and Berlekamp 1986), and
then subsets that give the right secret; whoever's shares do not lie on those polynomials is left out from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations, islice

import numpy as np

from fedge.secagg import shamir
from fedge.secagg.shamir import PRIME, Elements

Right = Callable[[bytes], bool]
"""Whether this is the secret that its owner has committed to."""

_P = np.uint64(PRIME)
_MAX_TRIES = 2000
"""Subsets that are tried for a secret: all that leave out two of 63, or one of any session."""


def rebuild(
    points: Sequence[int], shares: shamir.Shares, *, threshold: int, right: Sequence[Right]
) -> tuple[list[bytes], list[int]]:
    """(the secrets, which of them cannot be rebuilt) from uint32[len(points), n, LIMBS]; n are in `right`.

    With m shares, any (m - threshold) / 2 wrong ones are found, and more of them while there are few subsets to try.
    """
    liars: set[int] = set()
    secrets: list[bytes] = [b""] * len(right)
    missing = list(range(len(right)))
    while missing:
        honest = [at for at in range(len(points)) if at not in liars][:threshold]
        if len(honest) < threshold:
            return secrets, missing
        found = shamir.rebuild([points[at] for at in honest], shares[np.ix_(honest, missing)])
        wrong = []
        for at, secret in zip(missing, found, strict=True):
            if secret is not None and right[at](secret):
                secrets[at] = secret
            else:
                wrong.append(at)
        missing, lying = wrong, set()
        for at in missing:
            lying = _liars(points, shares[:, at], threshold, right[at]) - liars
            if lying:
                break
        if not lying:
            return secrets, missing
        liars |= lying
    return secrets, []


def _liars(points: Sequence[int], shares: shamir.Shares, threshold: int, right: Right) -> set[int]:
    """Which shares of one secret (uint32[m, LIMBS]) are not on the polynomials that give the right one; none if no
    such polynomials are found."""
    spare = len(points) - threshold
    candidates = [found] if len(found := _common_errors(points, shares, threshold)) <= spare else []
    subsets = (set(each) for count in range(1, spare + 1) for each in combinations(range(len(points)), count))
    for left_out in chain(candidates, islice(subsets, _MAX_TRIES)):
        base = [at for at in range(len(points)) if at not in left_out][:threshold]
        known = [points[at] for at in base]
        (secret,) = shamir.rebuild(known, shares[base][:, None])
        if secret is not None and right(secret):
            lines = [shamir.combine(known, shares[base], at=point) for point in points]
            return {at for at, line in enumerate(lines) if (line != shares[at]).any()}
    return set()


def _common_errors(points: Sequence[int], shares: shamir.Shares, threshold: int) -> set[int]:
    """The positions of wrong shares, over all limbs; any positions if they are too many for the rest to decide."""
    x = np.array(points, np.uint64)
    limbs = (shares[:, limb].astype(np.uint64) for limb in range(shamir.LIMBS))
    return set().union(*(_errors(x, y, threshold) for y in limbs))


def _errors(x: Elements, y: Elements, threshold: int) -> set[int]:
    """The positions at which y is not what one polynomial of degree below `threshold` is at x; any if too many.

    With e errors there are E (degree e, leading coefficient 1) and Q (degree below e + threshold) such that
    Q(x) = y E(x) at all points, and the polynomial is Q / E: y is wrong only where E is 0.
    """
    count = (len(x) - threshold) // 2
    powers = np.ones((len(x), threshold + count), np.uint64)
    for at in range(1, threshold + count):
        powers[:, at] = powers[:, at - 1] * x % _P
    left = np.concatenate([powers, (_P - y[:, None] * powers[:, :count] % _P) % _P], axis=1)
    solution = _solve(left, y * powers[:, count] % _P)
    locator = np.append(solution[threshold + count :], np.uint64(1))
    return {int(at) for at in np.flatnonzero(_dot(powers[:, : count + 1], locator) == 0)}


def _dot(matrix: Elements, vector: Elements) -> Elements:
    total: Elements = np.zeros(len(matrix), np.uint64)
    for column, factor in zip(matrix.T, vector, strict=True):
        total = (total + column * factor) % _P
    return total


def _solve(matrix: Elements, target: Elements) -> Elements:
    """Some solution of a linear system modulo PRIME, by elimination; anything if there is none."""
    rows = np.concatenate([matrix, target[:, None]], axis=1)
    unknowns, pivots, row = matrix.shape[1], [], 0
    for column in range(unknowns):
        candidates = np.flatnonzero(rows[row:, column])
        if not len(candidates):
            continue
        swap = row + int(candidates[0])
        rows[[row, swap]] = rows[[swap, row]]
        rows[row] = rows[row] * np.uint64(pow(int(rows[row, column]), PRIME - 2, PRIME)) % _P
        others = rows[:, column].copy()
        others[row] = 0
        rows = (rows + (_P - others[:, None]) % _P * rows[row][None, :] % _P) % _P
        pivots.append(column)
        row += 1
    solution: Elements = np.zeros(unknowns, np.uint64)
    for at, column in enumerate(pivots):
        solution[column] = rows[at, -1]
    return solution
