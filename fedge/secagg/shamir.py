"""Secret sharing (Shamir 1979) of 32-byte secrets, many at once: any `threshold` shares rebuild, fewer say nothing.

A secret is nine limbs of 31 bits, each the constant term of its own random polynomial over the integers modulo
PRIME. Share number x (from 1) is what the polynomials are at x. Products of two elements fit in 64 bits, so that
everything is a few numpy operations on all secrets and limbs together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedge.privacy.secure import SecureSource

PRIME = 2**31 + 11
SECRET_BYTES = 32
LIMBS = 9
_LIMB_BITS = 31
SHARE_BYTES = 4 * LIMBS

Elements = npt.NDArray[np.uint64]
Shares = npt.NDArray[np.uint32]

_P = np.uint64(PRIME)


def split(secrets: Sequence[bytes], *, shares: int, threshold: int, source: SecureSource) -> Shares:
    """Shares 1 to `shares` of each secret: uint32[shares, len(secrets), LIMBS].

    Raises:
        ValueError: a secret is not of 32 bytes, or not 1 <= threshold <= shares < PRIME.
    """
    if not 1 <= threshold <= shares < PRIME:
        raise ValueError(f"expected 1 <= threshold <= shares, found {threshold} of {shares}")
    constant = np.stack([_limbs(secret) for secret in secrets])
    count = (threshold - 1) * len(secrets) * LIMBS
    rest = uniform(source, count).reshape(threshold - 1, len(secrets), LIMBS)
    points = np.arange(1, shares + 1, dtype=np.uint64)[:, None, None]
    return _at(np.concatenate([constant[None], rest]), points).astype(np.uint32)


def uniform(source: SecureSource, count: int) -> Elements:
    """`count` independent uniform elements of the field, uint64[count]."""
    out: Elements = np.empty(count, np.uint64)
    # 2^64 is not a multiple of the prime: words past the last whole multiple are drawn again.
    limit = np.uint64(2**64 // PRIME * PRIME)
    missing = np.arange(count)
    while len(missing):
        words = source.uint64(len(missing))
        good = words < limit
        out[missing[good]] = words[good] % _P
        missing = missing[~good]
    return out


def weights_at(points: Sequence[int], at: int) -> Elements:
    """Lagrange's weights: what a polynomial of degree below len(points) is `at` is the sum, modulo PRIME, of its
    values at `points` times these. uint64[len(points)].

    Raises:
        ValueError: a point occurs twice, or is not in [0, PRIME).
    """
    if len(set(points)) != len(points) or not all(0 <= point < PRIME for point in points):
        raise ValueError(f"expected different points in [0, {PRIME}), found {list(points)[:10]}")
    x = np.array(points, np.uint64)
    above, below = np.ones(len(x), np.uint64), np.ones(len(x), np.uint64)
    for j in range(len(x)):
        here = x[j]
        others = np.arange(len(x)) != j
        above[others] = above[others] * ((np.uint64(at) + _P - here) % _P) % _P
        below[others] = below[others] * ((x[others] + _P - here) % _P) % _P
    return above * _inverse(below) % _P


def combine(points: Sequence[int], shares: Shares, *, at: int = 0) -> Elements:
    """What polynomials that take these values at `points` are `at`: uint32[len(points), ...] -> uint64[...]."""
    weights = weights_at(points, at)
    total: Elements = np.zeros(shares.shape[1:], np.uint64)
    for weight, share in zip(weights, shares, strict=True):
        total = (total + weight * share.astype(np.uint64)) % _P
    return total


def rebuild(points: Sequence[int], shares: Shares) -> list[bytes | None]:
    """The secrets that these shares are of, as many as their threshold: uint32[len(points), n, LIMBS] -> n secrets.

    None where the shares are of no secret at all. What is rebuilt from wrong shares is a wrong secret: whoever
    rebuilds compares it with what the owner has committed to.

    Raises:
        ValueError: a point occurs twice.
    """
    return [_secret(limbs) for limbs in combine(points, shares)]


def _at(coefficients: Elements, points: Elements) -> Elements:
    """Polynomials (lowest coefficient first) at points, by Horner's rule: [t, ...], [n, 1...] -> [n, ...]."""
    value: Elements = np.zeros((len(points), *coefficients.shape[1:]), np.uint64)
    for coefficient in coefficients[::-1]:
        value *= points
        value += coefficient
        value %= _P
    return value


def _inverse(values: Elements) -> Elements:
    """The inverses modulo PRIME, by Fermat's theorem; none of the values is 0."""
    result = np.ones_like(values)
    power, exponent = values.copy(), PRIME - 2
    while exponent:
        if exponent & 1:
            result = result * power % _P
        power = power * power % _P
        exponent >>= 1
    return result


def _limbs(secret: bytes) -> Elements:
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes, found {len(secret)}")
    number = int.from_bytes(secret, "little")
    return np.array([(number >> (_LIMB_BITS * i)) & (2**_LIMB_BITS - 1) for i in range(LIMBS)], np.uint64)


def _secret(limbs: Elements) -> bytes | None:
    number = 0
    for i, limb in enumerate(limbs.tolist()):
        if limb >> _LIMB_BITS:
            return None
        number |= limb << (_LIMB_BITS * i)
    return number.to_bytes(SECRET_BYTES, "little") if number >> (8 * SECRET_BYTES) == 0 else None
