"""Clients that lie: which they are, and what they send in place of what they have learned.

A simulation's seed decides who they are; they stay so for the whole run. They attack what leaves the site, behind the
gate that an honest one passes: what still stands in their way is the coordinator's. `label_flip`, `sybil` and
`backdoor` are in the data, and honest training makes of it what it can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedge.pipeline import l2_norm
from fedge.seeds import derive_seed
from fedge.simulation import AdversariesConfig
from fedge.strategy import WorkKind
from fedge.vector import Array

IN_THE_DATA = ("label_flip", "backdoor", "sybil")
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Adversaries:
    """Those of one simulation, and what they do."""

    names: frozenset[str]
    config: AdversariesConfig
    seed: int

    @classmethod
    def of(cls, config: AdversariesConfig, names: tuple[str, ...], *, seed: int) -> Adversaries:
        """`share` of the clients, rounded down, in an order that the seed draws."""
        count = math.floor(config.share * len(names) + 1e-9)  # 0.1 * 30 is meant to be 3
        ranked = sorted(names, key=lambda name: derive_seed(seed, "adversary", name))
        return cls(frozenset(ranked[:count]), config, seed)

    def poisons(self, name: str) -> bool:
        """Whether a client trains on other data than its own."""
        return name in self.names and self.config.attack in IN_THE_DATA

    @property
    def tampering(self) -> frozenset[str]:
        """Those who send something else than their work comes to."""
        return frozenset() if self.config.attack in ("label_flip", "sybil") else self.names

    @property
    def first(self) -> str:
        """Whose data all of them have who are one."""
        return min(self.names)

    def tampered(self, name: str, kind: WorkKind, round: int, honest: Array) -> Array:
        """What a client sends for an order, whose work came to `honest` (float32[size])."""
        if name not in self.tampering or kind == "evaluate":
            return honest
        factor = self.config.factor
        if self.config.attack in ("noise", "collusion"):
            whose = name if self.config.attack == "noise" else "all of them"
            generator = np.random.default_rng(derive_seed(self.seed, "adversary's noise", whose, round))
            drawn = generator.standard_normal(len(honest))
            lie = drawn * (factor * l2_norm(honest) / max(float(np.linalg.norm(drawn)), 1e-30))
        else:
            lie = honest.astype(np.float64) * (-factor if self.config.attack == "sign_flip" else factor)
        # Still finite: what is not would be refused, and cost the attacker its part.
        sent: Array = np.clip(lie, -_LARGEST, _LARGEST).astype(np.float32)
        return sent
