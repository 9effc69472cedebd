"""What a run asks for in secure aggregation, in numbers that everybody knows.

Nothing here is secret; all of it is in the context that every member signs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from fedge.cohort import SecureTerms, Terms
from fedge.errors import ConfigError
from fedge.events import OrderId
from fedge.pipeline import Mean
from fedge.privacy.mechanism import Skellam
from fedge.privacy.terms import Terms as PrivacyTerms
from fedge.run import Cohort, RunConfig
from fedge.secagg.canonical import digest
from fedge.secagg.encoding import BEYOND_BOUND, Encoding
from fedge.secagg.fixed_point import FixedPoint
from fedge.secagg.grid import Grid
from fedge.secagg.keys import Suite
from fedge.secagg.noise import Noise, honest_of, noise_for
from fedge.secagg.rotation import Rotation
from fedge.secagg.session import MAX_MEMBERS, MILLION, MIN_MEMBERS, Context
from fedge.secagg.shards import shards_for
from fedge.secagg.tail import Tail
from fedge.strategy import AnyStrategy
from fedge.vector import Layout

MAX_CLIENTS: Final = 1 << 20
MAX_NAMES: Final = 64

SUITES: Final = {"x25519": Suite.X25519, "x25519-mlkem768": Suite.X25519_MLKEM768}


@dataclass(frozen=True, slots=True)
class SumTerms:
    """How a run's updates are summed.

    Each sum is of `least` sites or more, all sums of an order of `clients` at most; of those who begin with a sum,
    `threshold_ppm` of a million must come to its end. Elements of updates are at most `bound` (or cut to it), or with
    `rotate` their L2 norm is; `bits` are those of an element. `metrics` are the names of those that ride beside.
    With `noise` the sums themselves are private: `bound` is then the norm that updates are clipped to.

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
    noise: Noise | None = None

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
        if self.noise is not None and (self.metrics or self.max_weight != 1):
            raise ValueError(
                "expected private sums of updates alone that weigh the same, found metrics or weights"
            )
        self.encoding(1, b"")  # raises
        _ = self.mechanism  # raises, if it has no price

    @classmethod
    def of(cls, run: RunConfig, strategy: AnyStrategy, layout: Layout) -> SumTerms | None:
        """The terms of a run with a model of this layout; None without secure aggregation.

        Raises:
            ConfigError: the strategy cannot do with a sum, or the sums do not fit.
        """
        if not run.secure_aggregation.enabled:
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
        weighted = reduction.weighting == "examples" and run.privacy.unit == "none"
        return cls.for_updates(run, layout, weighted=weighted)

    @classmethod
    def for_updates(cls, run: RunConfig, layout: Layout, *, weighted: bool) -> SumTerms:
        """The terms of a run with secure aggregation, whose strategy wants a mean.

        Raises:
            ConfigError: the sums do not fit, or no noise keeps the run's terms of privacy.
        """
        config, cohort, privacy = run.secure_aggregation, run.cohort, PrivacyTerms.of(run)
        clients = asked_of(cohort)
        try:
            plain = cls(
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
            return plain if privacy is None or privacy.unit != "client" else plain.with_noise(privacy, layout)
        except ValueError as error:
            raise ConfigError(f"secure_aggregation: {error}") from None

    def with_noise(self, privacy: PrivacyTerms, layout: Layout) -> SumTerms:
        """The same, of updates to which each member adds its share of the noise.

        Raises:
            ValueError: no noise keeps the terms of privacy, or it does not fit.
        """
        size = layout.trainable_size
        bound = Rotation(size, b"").largest(privacy.clip) if self.rotate else privacy.clip
        noise = noise_for(
            privacy, size, honest=self.honest, clients=self.members, bound=bound, bits=self.bits
        )
        return replace(self, bound=privacy.clip, max_weight=1, metrics=(), noise=noise)

    @property
    def members(self) -> int:
        """The most that one session has: what ranges are made for."""
        return min(self.clients, MAX_MEMBERS)

    @property
    def honest(self) -> int:
        """Members of any sum whose noise nobody else knows."""
        return honest_of(self.least, self.members, self.threshold_ppm)

    @property
    def mechanism(self) -> Skellam | None:
        """What one order costs each member; None where the sum itself protects nobody."""
        body = self.encoding(self.noise.size, b"").body if self.noise is not None else None
        return body.mechanism(self.honest) if isinstance(body, Grid) else None

    @property
    def rounding(self) -> float:
        """How much longer an update may be once it is rounded to the noise's grid; 1.0 where there is none."""
        body = self.encoding(self.noise.size, b"").body if self.noise is not None else None
        return body.l2 / (body.clip * body.steps) if isinstance(body, Grid) else 1.0

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
            privacy=self._noise_digest,
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
            return Encoding(0, None, tail, None)
        noise, members = self.noise, self.members
        summed = size if noise is None else noise.size
        rotation = Rotation(summed, digest("rotation", seed)) if self.rotate else None
        bound = rotation.largest(self.bound) if rotation is not None else self.bound
        body: FixedPoint | Grid
        if noise is None:
            body = FixedPoint(size, bound, members, self.max_weight, self.bits)
        else:
            body = Grid(noise.size, self.bound, bound, noise.steps, noise.variance, members, self.bits)
        return Encoding(size, body, tail, rotation)

    @property
    def digest(self) -> bytes:
        """What stands for the encoding in a session's context: 32 bytes."""
        return digest(
            "vectors",
            *(self.bits, float(self.bound).hex(), self.clients, self.max_weight, int(self.rotate)),
            *self.metrics,
        )

    @property
    def _noise_digest(self) -> bytes:
        """What stands for the noise in a session's context; empty without any."""
        if self.noise is None:
            return b""
        return digest(
            "noise", self.noise.size, self.noise.steps.hex(), self.noise.variance.hex(), self.honest
        )


def asked_of(cohort: Cohort) -> int:
    """How many sites a run asks in each round."""
    return Terms(cohort.size, cohort.needed, cohort.over_select).asked


def least_of(quorum: int, clients: int) -> int:
    """Of how many each sum is at least where `quorum` are enough in all: a shard that is three deviations below the
    average of shards is left out."""
    average = quorum / shards_for(clients)
    return quorum if average == quorum else max(MIN_MEMBERS, math.floor(average - 3 * math.sqrt(average)))
