"""Floats as whole numbers of a ring, so that the sum of many can be read and none of them.

An update is multiplied by its weight, a whole number, so that a weighted mean is two sums. Each product is rounded up
or down at random, in proportion: on average nothing is lost. Steps are as fine as the ring allows for the largest
inputs of the most clients, with one bit to spare, in which a sum that wrapped around would show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedge.errors import RunError
from fedge.privacy.secure import SecureSource
from fedge.secagg.ring import Ring, Words
from fedge.vector import Array

_PART = 1 << 16
_WORD = 2.0**-32


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """float32[size] with elements of at most `bound`, times weights of at most `max_weight`, from at most `clients`.

    Raises:
        ValueError: a number is out of range, or the sums do not fit in `bits` bits.
    """

    size: int
    bound: float
    clients: int
    max_weight: int = 1
    bits: int = 32

    def __post_init__(self) -> None:
        Ring(self.bits)
        for name in ("size", "bound", "clients", "max_weight"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")
        if self.levels < 2 * self.max_weight:
            raise ValueError(
                f"bits: expected sums of {self.clients} clients with weights up to {self.max_weight} to fit, found "
                f"{self.bits} bits, which leave {self.levels / self.max_weight:.2g} steps for each; use more bits, "
                "smaller weights or fewer clients"
            )

    @property
    def ring(self) -> Ring:
        return Ring(self.bits)

    @property
    def levels(self) -> float:
        """The most that one client's element can be, in steps."""
        return 2.0 ** (self.bits - 2) / self.clients - 1

    @property
    def steps(self) -> float:
        """How many steps are 1.0 of an update that weighs 1."""
        return self.levels / (self.max_weight * self.bound)

    def cuts(self, vector: Array) -> bool:
        """Whether an element is beyond `bound`."""
        return bool(max(vector.max(), -vector.min()) > self.bound)

    def encode(self, vector: Array, weight: int, source: SecureSource) -> Words:
        """`weight * vector` in steps: float32[size] -> words[size]. Elements beyond `bound` are cut to it.

        Raises:
            ValueError: the vector is of another size or not finite, or the weight out of range.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} elements, found {vector.shape}")
        if not 1 <= weight <= self.max_weight:
            raise ValueError(f"expected a weight of 1 to {self.max_weight}, found {weight}")
        out, scale = self.ring.zeros(self.size), weight * self.steps
        for start in range(0, self.size, _PART):
            part = np.clip(vector[start : start + _PART], -self.bound, self.bound).astype(np.float64)
            if not np.isfinite(part).all():
                raise ValueError("expected a finite vector to encode, found NaN in it")
            part *= scale
            part += source.uint32(len(part)) * _WORD
            np.floor(part, out=part)
            out[start : start + _PART] = self.ring.of(part.astype(np.int64))
        return out

    def decode(self, total: Words, members: int) -> npt.NDArray[np.float64]:
        """The sum of what so many have encoded: words[size] -> float64[size], of weighted updates.

        Raises:
            RunError: it is beyond what they can have encoded.
        """
        signed = self.ring.signed(total)
        most = math.ceil(members * (self.levels + 1))
        if max(int(signed.max()), -int(signed.min())) > most:
            raise RunError(
                "the secure sum is beyond what its members may add to it: one of them has sent something else"
            )
        decoded: npt.NDArray[np.float64] = signed / self.steps
        return decoded
