"""`[privacy]`: what a run promises about the data, checked so that no setting can break the promise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedge.config import Config

Protected = Literal["example", "client"]
"""Whom noise protects: one example, or all that a site has."""

Unit = Literal["none", "example", "client"]

SMALLEST, LARGEST = 1e-9, 1e9
"""What every number of a promise lies between, so that noise in float32 neither vanishes nor overflows."""

Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]

_PROMISES = (
    "epsilon",
    "delta",
    "noise_multiplier",
    "evaluation_noise_multiplier",
    "max_participations",
    "adaptive_clip",
)


class AdaptiveClip(Config):
    """`[privacy.adaptive_clip]`: the clip moves so that the share `target` of updates is not clipped.

    `noise_multiplier` is for the count of those; without the key it follows from the cohort's size.
    """

    target: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: Annotated[float, Field(gt=0, le=2)] = 0.2
    noise_multiplier: Positive | None = None


class Privacy(Config):
    """`[privacy]`. With a `unit`, noise is calibrated so that `epsilon` at `delta` holds at every site.

    `noise_multiplier` fixes the noise instead; with both, a site whose cost would exceed `epsilon` refuses.
    `max_participations` bounds the rounds that a site takes part in (otherwise: all), and with it the noise. Where
    sites add the noise inside a secure sum, each attempt at a round is a turn once a site has handed in its update:
    then it may be more than the rounds.
    Nothing is evaluated unless `evaluation_noise_multiplier` says with how much noise. With the unit "client",
    a site rests `separation - 1` rounds after each, and the noise of so many rounds is correlated.
    """

    unit: Unit = "example"
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Positive | None = None
    noise_multiplier: Positive | None = None
    evaluation_noise_multiplier: Positive | None = None
    loss_bound: Positive = 10.0
    max_participations: Count | None = None
    separation: Annotated[int, Field(ge=1, le=256)] = 1
    adaptive_clip: AdaptiveClip | None = None
    amplification: Literal["none", "cohort"] = "none"

    @model_validator(mode="after")
    def _keeps_its_promise(self) -> Privacy:
        if self.amplification == "cohort":
            raise ValueError(
                "amplification: the coordinator chooses the cohort, so privacy against it is not amplified by "
                "that choice; leave the key out, and say max_participations to pay for fewer rounds"
            )
        if self.unit == "none":
            given = [name for name in _PROMISES if getattr(self, name) is not None]
            given += ["separation"] if self.separation > 1 else []
            if given:
                raise ValueError(
                    f'{" and ".join(given)} promise a guarantee that unit = "none" does not give'
                )
            return self
        if self.unit == "example" and (self.separation > 1 or self.adaptive_clip is not None):
            raise ValueError(
                "separation and adaptive_clip are for noise that the coordinator adds to a round's sum, under "
                'unit = "client"'
            )
        if self.clip is None:
            raise ValueError(
                f"clip: expected the largest norm of one {self.unit}'s part, found none: noise without a bound "
                "on what it hides protects nothing"
            )
        if self.delta is None:
            raise ValueError("delta: expected a number far below 1 / (examples of a site), found none")
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("expected epsilon (or noise_multiplier), found neither")
        return self
