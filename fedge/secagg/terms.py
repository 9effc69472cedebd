"""What a run asks for in secure aggregation, in numbers that everybody knows.

Nothing here is secret; all of it is in the context that every member signs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedge.cohort import SecureTerms, Terms
from fedge.errors import ConfigError
from fedge.events import OrderId
from fedge.pipeline import Mean
from fedge.run import Cohort, RunConfig
from fedge.secagg.canonical import digest
from fedge.secagg.encoding import BEYOND_BOUND, Encoding
from fedge.secagg.fixed_point import FixedPoint
from fedge.secagg.keys import Suite
from fedge.secagg.rotation import Rotation
from fedge.secagg.session import MAX_MEMBERS, MILLION, MIN_MEMBERS, Context
from fedge.secagg.shards import shards_for
from fedge.secagg.tail import Tail
from fedge.strategy import AnyStrategy

MAX_CLIENTS: Final = 1 << 20
MAX_NAMES: Final = 64

SUITES: Final = {"x25519": Suite.X25519, "x25519-mlkem768": Suite.X25519_MLKEM768}


@dataclass(frozen=True, slots=True)
class SumTerms:
    """How a run's updates are summed.

    Each sum is of `least` sites or more, all sums of an order of `clients` at most; of those who begin with a sum,
    `threshold_ppm` of a million must come to its end. Elements of updates are at most `bound` (or cut to it), or with
    `rotate` their L2 norm is; `bits` are those of an element. `metrics` are the names of those that ride beside.

    Raises:
        ValueError: a number is out of range, or the sums do not fit in the bits.
    """

    least: int
    clients: int
    bound: float
    suite: Suite = Suite.X25519
    bits: int = 32
    threshold_ppm: int = 0
    consistency: bool = True
    max_weight: int = 1
    rotate: bool = False
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not MIN_MEMBERS <= self.least <= self.clients <= MAX_CLIENTS:
            raise ValueError(
                f"expected sums of {MIN_MEMBERS} sites or more, of two of which each knows the other's part, and of at "
                f"most {MAX_CLIENTS}; found {self.least} to {self.clients}"
            )
        if self.least > MAX_MEMBERS:
            raise ValueError(
                f"least: expected at most {MAX_MEMBERS} sites, the most that one sum has, found {self.least}"
            )
        if not 8 <= self.bits <= 32:
            raise ValueError(f"bits: expected 8 to 32 of an element, found {self.bits}")
        if not 0 <= self.threshold_ppm <= MILLION:
            raise ValueError(f"threshold: expected 0 to 1, found {self.threshold_ppm / MILLION}")
        if len(self.metrics) > MAX_NAMES or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics: expected at most {MAX_NAMES} different names, found {self.metrics}")
        self.encoding(1, b"")

    @classmethod
    def of(cls, run: RunConfig, strategy: AnyStrategy) -> SumTerms | None:
        """The terms of a run; None without secure aggregation.

        Raises:
            ConfigError: the strategy cannot do with a sum, or the sums do not fit.
        """
        config, cohort = run.secure_aggregation, run.cohort
        if not config.enabled:
            return None
        reduction = strategy.reduction
        if not isinstance(reduction, Mean):
            raise ConfigError(
                "secure_aggregation: expected a strategy that needs the mean of updates alone, found "
                f"{run.strategy.name!r} with {type(reduction).__name__}, which looks at each of them"
            )
        if strategy.max_staleness is not None:
            raise ConfigError(
                f"secure_aggregation: expected a strategy with rounds, found {run.strategy.name!r}, which takes each "
                "update as it comes: there is nothing to hide it among"
            )
        clients = asked_of(cohort)
        weighted = reduction.weighting == "examples" and run.privacy.unit == "none"
        try:
            return cls(
                least=least_of(cohort.needed, clients),
                clients=clients,
                bound=config.bound,
                suite=SUITES[config.suite],
                bits=config.bits,
                threshold_ppm=math.ceil((config.threshold or 0) * MILLION),
                consistency=config.consistency,
                max_weight=config.max_weight if weighted else 1,
                rotate=config.rotate,
                metrics=(*config.metrics, BEYOND_BOUND),
            )
        except ValueError as error:
            raise ConfigError(f"secure_aggregation: {error}") from None

    @property
    def members(self) -> int:
        """The most that one session has: what ranges are made for."""
        return min(self.clients, MAX_MEMBERS)

    @property
    def shards(self) -> int:
        return shards_for(self.clients)

    def context(
        self, *, federation: str, run_id: str, order: OrderId, offer: bytes, model: bytes, epoch: int
    ) -> Context:
        """What an order's first (or only) sum is about. `offer` and `model` are digests of what was agreed for the run
        and of what the order asks; `epoch` is that of the directory."""
        return Context(
            federation=federation,
            run_id=run_id,
            order=order,
            suite=self.suite,
            vectors=self.digest,
            privacy=b"",
            offer=offer,
            model=model,
            least=self.least,
            most=self.members,
            threshold_ppm=self.threshold_ppm,
            epoch=epoch,
            consistency=self.consistency,
            shards=self.shards,
        )

    def of_round(self, exchange_s: float) -> SecureTerms:
        """What the round's machine goes by."""
        return SecureTerms(self.least, self.threshold_ppm, self.consistency, exchange_s)

    def encoding(self, size: int, seed: bytes) -> Encoding:
        """Of vectors of `size` elements (0: of an evaluation, which has none). Those of one seed rotate alike."""
        tail = Tail(self.metrics, self.members, self.max_weight)
        if not size:
            return Encoding(None, tail, None)
        rotation = Rotation(size, digest("rotation", seed)) if self.rotate else None
        bound = rotation.largest(self.bound) if rotation is not None else self.bound
        return Encoding(FixedPoint(size, bound, self.members, self.max_weight, self.bits), tail, rotation)

    @property
    def digest(self) -> bytes:
        """What stands for the encoding in a session's context: 32 bytes."""
        return digest(
            "vectors",
            *(self.bits, float(self.bound).hex(), self.clients, self.max_weight, int(self.rotate)),
            *self.metrics,
        )


def asked_of(cohort: Cohort) -> int:
    """How many sites a run asks in each round."""
    return Terms(cohort.size, cohort.needed, cohort.over_select).asked


def least_of(quorum: int, clients: int) -> int:
    """Of how many each sum is at least where `quorum` are enough in all: a shard that is three deviations below the
    average of shards is left out."""
    average = quorum / shards_for(clients)
    return quorum if average == quorum else max(MIN_MEMBERS, math.floor(average - 3 * math.sqrt(average)))
