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

from fedge.pipeline import Clip
from fedge.privacy.mechanism import Skellam
from fedge.privacy.secure import SecureSource
from fedge.privacy.skellam import MAX_VARIANCE, SkellamSampler
from fedge.vector import Array

Ring = npt.NDArray[np.uint32]
Whole = npt.NDArray[np.int64]

_BIAS = math.exp(-0.5)
"""Rounding is drawn again in at most this share of cases (beta in the paper)."""

_TAIL = 14.0
"""Deviations of the noise on a sum that must fit beside the largest sum: 2^-140 of it is beyond."""

_WORD = 2.0**-32


@dataclass(frozen=True, slots=True)
class Grid:
    """How float vectors of norm at most `clip` become private whole numbers modulo 2^`bits`.

    `size` elements; `steps` grid steps are one unit of the vector; each site's noise has `variance` steps^2. At
    most `clients` sites are summed.

    Raises:
        ValueError: a number is out of range, or the largest sum and its noise do not fit in the ring.
    """

    size: int
    clip: float
    steps: float
    variance: float
    clients: int
    bits: int = 32

    def __post_init__(self) -> None:
        for name in ("size", "clip", "steps", "variance", "clients"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")
        if not 8 <= self.bits <= 32:
            raise ValueError(f"bits: expected 8 to 32, found {self.bits}")
        if self.variance > MAX_VARIANCE:
            raise ValueError(f"variance: expected at most 2^30 for a site, found {self.variance:g}")
        if self.largest_sum >= 2 ** (self.bits - 1):
            raise ValueError(
                f"expected sums within 2^{self.bits - 1}, found {self.largest_sum:.4g} possible with {self.clients} "
                "clients; use fewer steps or more bits"
            )

    @classmethod
    def of(
        cls,
        *,
        size: int,
        clip: float,
        noise_multiplier: float,
        honest: int,
        clients: int,
        bits: int = 32,
    ) -> Grid:
        """The finest grid that fits, with noise of `noise_multiplier` times the L2 sensitivity on a sum whose noise
        only `honest` of its `clients` have added.

        Raises:
            ValueError: no grid fits: too few bits for so many clients.
        """
        if not 1 <= honest <= clients:
            raise ValueError(f"honest: expected 1 to {clients} of as many clients, found {honest}")

        def at(scaled_clip: float) -> Grid:
            l2 = rounded_norm(scaled_clip, size)
            variance = (noise_multiplier * l2) ** 2 / honest
            return cls(size, clip, scaled_clip / clip, variance, clients, bits)

        low, high = 0.0, 2.0**31
        for _ in range(64):
            middle = (low + high) / 2
            try:
                at(middle)
            except ValueError:
                high = middle
            else:
                low = middle
        if low == 0:
            raise ValueError(
                f"bits: expected more than {bits} for a sum of {clients} clients with this noise"
            )
        return at(low)

    @property
    def l2(self) -> float:
        """The largest norm of a rounded vector, in steps: what a client more or less changes a sum by."""
        return rounded_norm(self.clip * self.steps, self.size)

    @property
    def l1(self) -> float:
        """The largest L1 norm: by Cauchy and Schwarz, and because a whole number is at most its square."""
        return min(math.sqrt(self.size) * self.l2, self.l2**2)

    @property
    def largest_sum(self) -> float:
        """An element of a sum is beyond this, in steps, with a probability below 2^-128."""
        noise = math.sqrt(self.clients * self.variance)
        return self.clients * (self.clip * self.steps + 1) + _TAIL * noise + 90

    def mechanism(self, honest: int) -> Skellam:
        """What a sum costs each client, if so many of those in it have added their noise."""
        return Skellam(honest * self.variance, self.l2, self.l1)

    def encode(self, vector: Array, source: SecureSource) -> Ring:
        """What a site sends: float32[size] -> uint32[size], modulo 2^`bits`.

        Raises:
            ValueError: it is of another size, or not finite.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} elements, found {vector.shape}")
        clipped = Clip(self.clip).encode(vector).astype(np.float64) * self.steps
        whole = conditional_round(clipped, self.l2, source)
        whole += SkellamSampler.of(self.variance).sample(source, self.size)
        return self._ring(whole)

    def decode(self, total: Ring) -> Array:
        """The sum of what sites have encoded: uint32[size] -> float32[size], in the vectors' units."""
        signed = self._ring(total.astype(np.int64)).astype(np.int64)
        signed[signed >= 1 << (self.bits - 1)] -= 1 << self.bits
        out: Array = (signed / self.steps).astype(np.float32)
        return out

    def _ring(self, whole: Whole) -> Ring:
        ring: Ring = (whole & ((1 << self.bits) - 1)).astype(np.uint32)
        return ring


def rounded_norm(scaled_clip: float, size: int) -> float:
    """A norm that rounding a vector of norm `scaled_clip` stays within, but for a share of cases that is drawn
    again: Kairouz, Liu and Steinke 2021, equation 3, with a step of 1."""
    root = math.sqrt(size)
    likely = scaled_clip**2 + size / 4 + math.sqrt(-2 * math.log(_BIAS)) * (scaled_clip + root / 2)
    return math.sqrt(min(likely, (scaled_clip + root) ** 2))


def conditional_round(scaled: npt.NDArray[np.float64], most: float, source: SecureSource) -> Whole:
    """Each element up or down to a whole number, up with the probability of its fraction; all of it drawn again
    until the L2 norm is at most `most`."""
    floor = np.floor(scaled)
    fraction = scaled - floor
    whole = floor.astype(np.int64)
    while True:
        up = source.uint32(len(scaled)) * _WORD < fraction
        rounded: Whole = whole + up
        if math.sqrt(float(np.dot(rounded.astype(np.float64), rounded))) <= most:
            return rounded
