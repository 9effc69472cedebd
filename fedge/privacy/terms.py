"""What a run asks of a site for privacy, in numbers, and what that costs the site.

The same functions price a run for its owner before it starts, for a site's gate and for the simulator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedge.privacy.calibration import noise_multiplier_for
from fedge.privacy.config import LARGEST, SMALLEST, Protected
from fedge.privacy.example import ONE_RELEASE, Schedule, evaluation_mechanism
from fedge.privacy.mechanism import Gaussian, Mechanism, Skellam, merged, scaled
from fedge.privacy.rdp import epsilon_of, total
from fedge.run import RunConfig, Work


@dataclass(frozen=True, slots=True)
class Terms:
    """A run's privacy as it is offered to sites.

    `participations` and `evaluations` are the most that the run may ask of one site: so many are paid for.
    `separation` is the fewest rounds from one turn of a site to its next.
    """

    unit: Protected
    delta: float
    clip: float
    participations: int
    evaluations: int = 0
    epsilon: float | None = None
    noise_multiplier: float | None = None
    evaluation_noise_multiplier: float | None = None
    loss_bound: float = 10.0
    separation: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("example", "client"):
            raise ValueError(f"unit: expected 'example' or 'client', found {str(self.unit)[:80]!r}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta: expected a number between 0 and 1, found {self.delta}")
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("expected epsilon or noise_multiplier, found neither")
        if self.participations < 1 or self.evaluations < 0:
            raise ValueError(f"expected 1 participation or more, found {self.participations}")
        if self.separation < 1:
            raise ValueError(f"separation: expected 1 round or more, found {self.separation}")
        if self.evaluations and self.evaluation_noise_multiplier is None:
            raise ValueError("evaluations: expected noise for them, found none")
        for name in ("clip", "loss_bound", "epsilon", "noise_multiplier", "evaluation_noise_multiplier"):
            value = getattr(self, name)
            if value is not None and not SMALLEST <= value <= LARGEST:
                raise ValueError(f"{name}: expected a number from {SMALLEST:g} to {LARGEST:g}, found {value}")

    @classmethod
    def of(cls, run: RunConfig) -> Terms | None:
        """The terms of a run; None without differential privacy."""
        privacy = run.privacy
        if privacy.unit == "none":
            return None
        assert privacy.clip is not None  # Privacy insists on both
        assert privacy.delta is not None
        every = run.evaluation_every
        turns = privacy.max_participations or run.rounds
        # With noise inside secure sums, more turns than there are rounds pay for spare attempts.
        if not (privacy.unit == "client" and run.secure_aggregation.enabled):
            turns = min(turns, -(-run.rounds // privacy.separation))
        return cls(
            unit=privacy.unit,
            delta=privacy.delta,
            clip=privacy.clip,
            participations=turns,
            evaluations=-(-run.rounds // every) if every else 0,
            epsilon=privacy.epsilon,
            noise_multiplier=privacy.noise_multiplier,
            evaluation_noise_multiplier=privacy.evaluation_noise_multiplier,
            loss_bound=privacy.loss_bound,
            separation=privacy.separation,
        )

    def evaluation(self) -> Gaussian | None:
        """What one evaluation costs; None if there are none."""
        if self.evaluation_noise_multiplier is None:
            return None
        return evaluation_mechanism(self.evaluation_noise_multiplier)


_ALMOST = 1 - 1e-9
"""Numbers that went through a square root and back are not the same to the last bit."""


@dataclass(frozen=True, slots=True)
class Price:
    """A run at one site: its noise, what each order costs, and what all of them cost."""

    noise_multiplier: float
    order: Mechanism
    evaluation: Gaussian | None
    run: tuple[Mechanism, ...]


def price(
    terms: Terms,
    work: Work,
    kind: Literal["train", "gradient"],
    size: int,
    *,
    summed: Skellam | None = None,
) -> Price:
    """A run at a site of `size` training examples (which matters to example-level privacy alone).

    The noise is as given, or the least with which the whole run stays within the terms' epsilon, its
    evaluations included. At client level a round is one release of everything the site has: whom the
    coordinator asks amplifies nothing. `summed` is what an order costs where secure sums have their members' noise.

    Raises:
        ValueError: no noise is enough, what is given is too little, or the evaluations alone cost more.
    """
    schedule = Schedule.of(work, size, kind) if terms.unit == "example" else ONE_RELEASE
    evaluation = terms.evaluation()
    evaluations = (scaled(evaluation, terms.evaluations),) if evaluation and terms.evaluations else ()
    noise_multiplier = terms.noise_multiplier
    if summed is not None:
        found = math.sqrt(summed.variance) / summed.l2
        if found < (noise_multiplier or 0) * _ALMOST:
            raise ValueError(f"expected sums with noise multiplier {noise_multiplier:g}, found {found:g}")
        noise_multiplier = found
    elif noise_multiplier is None:
        assert terms.epsilon is not None  # one of the two is given
        noise_multiplier = noise_multiplier_for(
            terms.epsilon,
            terms.delta,
            sampling_rate=schedule.sampling_rate,
            count=schedule.steps * terms.participations,
            spent=total(evaluations),
        )
    order = schedule.mechanism(noise_multiplier) if summed is None else summed
    whole = scaled(order, order.count * terms.participations)
    run = merged((whole, *evaluations))
    if terms.epsilon is not None and epsilon_of(run, terms.delta) > terms.epsilon:
        raise ValueError(
            f"noise multiplier {noise_multiplier:g} is too little for epsilon {terms.epsilon:g} at delta "
            f"{terms.delta:g} here; leave one of them out"
        )
    return Price(noise_multiplier, order, evaluation, run)
