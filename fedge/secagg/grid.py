"""Client-level privacy on the integer grid: each site clips, scales, rounds and adds its share of Skellam noise,
so that a sum of what the sites send is private although nobody adds noise to it.

Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation", section 4 (rounding); Agarwal, Kairouz and Liu 2021 (noise). Pure: randomness is an argument.
Rotation, where it is wanted, comes before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedge.errors import RunError
from fedge.pipeline import Clip
from fedge.privacy.mechanism import Skellam
from fedge.privacy.secure import SecureSource
from fedge.privacy.skellam import MAX_VARIANCE, SkellamSampler
from fedge.secagg.ring import Ring, Whole, Words
from fedge.vector import Array

_BIAS = math.exp(-0.5)
"""Rounding is drawn again in at most this share of cases (beta in the paper)."""

_TAIL = 14.0
"""Deviations of the noise on a sum that must fit beside the largest sum: 2^-140 of it is beyond."""

_FINE = 2.0**24
"""A variance of each site's noise beyond which finer steps gain nothing for short vectors."""

_WORD = 2.0**-32
_PART = 1 << 16


@dataclass(frozen=True, slots=True)
class Grid:
    """How float32[size] of norm at most `clip` becomes private whole numbers modulo 2^`bits`.

    `steps` grid steps are one unit of the vector; each site's noise has `variance` steps^2. At most `clients` sites
    are summed. Elements are at most `bound`, or cut to it: the clip itself, unless vectors are rotated.

    Raises:
        ValueError: a number is out of range, or the largest sum and its noise do not fit in the ring.
    """

    size: int
    clip: float
    bound: float
    steps: float
    variance: float
    clients: int
    bits: int = 32

    def __post_init__(self) -> None:
        for name in ("size", "clip", "bound", "steps", "variance", "clients"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")
        if not 8 <= self.bits <= 32:
            raise ValueError(f"bits: expected 8 to 32, found {self.bits}")
        if self.variance > MAX_VARIANCE:
            raise ValueError(f"variance: expected at most 2^30 for a site, found {self.variance:g}")
        if self.largest_sum(self.clients) >= 2 ** (self.bits - 1):
            raise ValueError(
                f"expected sums within 2^{self.bits - 1}, found {self.largest_sum(self.clients):.4g} possible with "
                f"{self.clients} clients; use fewer steps or more bits"
            )

    @classmethod
    def of(
        cls,
        *,
        size: int,
        clip: float,
        bound: float,
        noise_multiplier: float,
        honest: int,
        clients: int,
        bits: int = 32,
    ) -> Grid:
        """The finest grid that fits and is of use, with noise of `noise_multiplier` times the L2 sensitivity on a sum
        whose noise only `honest` of its `clients` have added.

        Raises:
            ValueError: no grid fits: too few bits for so many clients.
        """
        if not 1 <= honest <= clients:
            raise ValueError(f"honest: expected 1 to {clients} of as many clients, found {honest}")
        # So fine that rounding adds a hundredth to the norm, if a table of the noise has the room for it.
        finest = min(max(_FINE, 16.0 * size * noise_multiplier**2 / honest), MAX_VARIANCE)

        def variance(scaled_clip: float) -> float:
            return (noise_multiplier * rounded_norm(scaled_clip, size)) ** 2 / honest

        def fits(scaled_clip: float) -> bool:
            noise = variance(scaled_clip)
            largest = _largest(clients, scaled_clip * bound / clip, noise)
            return noise <= finest and largest < 2 ** (bits - 1)

        low, high = 0.0, 2.0**31
        for _ in range(64):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low == 0:
            raise ValueError(
                f"bits: no grid of {bits} bits holds a sum of {clients} clients and the noise that it takes; use "
                "more bits, fewer rounds or a larger epsilon"
            )
        return cls(size, clip, bound, low / clip, variance(low), clients, bits)

    @property
    def ring(self) -> Ring:
        return Ring(self.bits)

    @property
    def l2(self) -> float:
        """The largest norm of a rounded vector, in steps: what a client more or less changes a sum by."""
        return rounded_norm(self.clip * self.steps, self.size)

    @property
    def l1(self) -> float:
        """The largest L1 norm: by Cauchy and Schwarz, and because a whole number is at most its square."""
        return max(self.l2, min(math.sqrt(self.size) * self.l2, self.l2**2))

    def largest_sum(self, members: int) -> float:
        """An element of a sum of so many is beyond this, in steps, with a probability below 2^-128."""
        return _largest(members, self.bound * self.steps, self.variance)

    def mechanism(self, honest: int) -> Skellam:
        """What a sum costs each client, if so many of those in it have added their noise."""
        return Skellam(honest * self.variance, self.l2, self.l1)

    def encode(self, vector: Array, weight: int, source: SecureSource) -> Words:
        """What a site sends, before it is masked: float32[size] -> words[size].

        Raises:
            ValueError: it is of another size, or not finite, or weighs anything but 1.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} elements, found {vector.shape}")
        if weight != 1:
            raise ValueError(f"expected private updates to weigh the same, found a weight of {weight}")
        clipped = np.clip(Clip(self.clip).encode(vector), -self.bound, self.bound)
        whole = conditional_round(clipped, self.steps, self.l2, source)
        sampler, out = SkellamSampler.of(self.variance), self.ring.zeros(self.size)
        for start in range(0, self.size, _PART):
            part = whole[start : start + _PART]
            part += sampler.sample(source, len(part))
            out[start : start + _PART] = self.ring.of(part)
        return out

    def decode(self, total: Words, members: int) -> npt.NDArray[np.float64]:
        """The sum of what so many have encoded: words[size] -> float64[size], in the vectors' units.

        Raises:
            RunError: it is beyond what they can have encoded.
        """
        signed = self.ring.signed(total)
        if max(int(signed.max()), -int(signed.min())) > self.largest_sum(members):
            raise RunError(
                "the secure sum is beyond what its members may add to it: one of them has sent something else"
            )
        decoded: npt.NDArray[np.float64] = signed / self.steps
        return decoded


def rounded_norm(scaled_clip: float, size: int) -> float:
    """A norm that rounding a vector of norm `scaled_clip` stays within, but for a share of cases that is drawn
    again: Kairouz, Liu and Steinke 2021, equation 3, with a step of 1."""
    root = math.sqrt(size)
    likely = scaled_clip**2 + size / 4 + math.sqrt(-2 * math.log(_BIAS)) * (scaled_clip + root / 2)
    return math.sqrt(min(likely, (scaled_clip + root) ** 2))


def conditional_round(
    vector: npt.NDArray[np.floating], steps: float, most: float, source: SecureSource
) -> Whole:
    """`steps * vector`, each element up or down to a whole number, up with the probability of its fraction; all of
    it drawn again until the L2 norm is at most `most`: float[n] -> int64[n]."""
    whole = np.empty(len(vector), np.int64)
    while True:
        square = 0.0
        for start in range(0, len(vector), _PART):
            scaled = vector[start : start + _PART].astype(np.float64) * steps
            rounded = np.floor(scaled)
            rounded += source.uint32(len(scaled)) * _WORD < scaled - rounded
            whole[start : start + _PART] = rounded
            rounded *= rounded
            square += float(rounded.sum())
        if math.sqrt(square) <= most:
            return whole


def _largest(members: int, largest: float, variance: float) -> float:
    return members * (largest + 1) + _TAIL * math.sqrt(members * variance) + 90
