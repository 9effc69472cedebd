"""SCAFFOLD: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1
with option II; see `fedge.variates` for what its clients do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedge.errors import ConfigError, RunError
from fedge.pipeline import Aggregate, Mean, Weighting
from fedge.run import RunConfig
from fedge.strategy import Order
from fedge.variates import unsuited
from fedge.vector import Array, Model, all_finite
from fedge_strategies.fedavg import moved


@dataclass(frozen=True, eq=False)
class ScaffoldState:
    """The model float32[n], of which the first `trainable` elements are trained, and their control variate c."""

    model: Array
    trainable: int
    control: Array


@dataclass(frozen=True, slots=True)
class Scaffold:
    """theta <- theta + eta_s * mean_i(theta_i - theta), after local steps that follow g_i - c_i + c;
    c <- c + (S / N) * mean_i(c_i+ - c_i), for S of all N `clients`.

    Where all clients take part in each round the means may be weighted by examples: of a part of them such means would
    be of other weights each time, and c the mean of nothing. eta_s is 1 for floating-point buffers. `steps` and
    `learning_rate` are those of `[work]`.
    """

    clients: Annotated[int, Field(ge=1)]
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    weighting: Weighting = "uniform"
    steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 0.05

    @property
    def reduction(self) -> Mean:
        return Mean(self.weighting)

    @property
    def max_staleness(self) -> None:
        return None

    def check(self, run: RunConfig) -> None:
        """
        Raises:
            ConfigError: the run's sites cannot do what this strategy asks, or are more than it knows of.
        """
        work = run.work
        if why := unsuited(work):
            raise ConfigError(f"strategy scaffold: {why}")
        if (work.steps, work.learning_rate) != (self.steps, self.learning_rate):
            raise ConfigError(
                f"strategy scaffold: expected the steps and learning_rate of [work], {work.steps} and "
                f"{work.learning_rate:g}, found {self.steps} and {self.learning_rate:g}: leave them out of [strategy]"
            )
        if run.cohort.size > self.clients:
            raise ConfigError(
                f"strategy.clients: expected all clients of the federation, {run.cohort.size} (cohort.size) or more, "
                f"found {self.clients}"
            )
        if self.weighting == "examples" and run.cohort.needed < self.clients:
            raise ConfigError(
                f"strategy.weighting: expected uniform where not all {self.clients} clients take part in each round "
                "(cohort.size, cohort.quorum), found examples: control variates would not come to a common mean"
            )
        if run.privacy.unit == "client":
            raise ConfigError(
                "privacy.unit: strategy scaffold cannot have noise in the mean of updates, which would stay in the "
                "server's control variate and in no client's: choose unit = 'example', or another strategy"
            )
        if run.secure_aggregation.enabled and run.secure_aggregation.rotate:
            raise ConfigError(
                "secure_aggregation.rotate: with strategy scaffold expected false: a client would not know what the "
                "sum has of an update that is cut"
            )

    def init(self, model: Model) -> ScaffoldState:
        trainable = model.layout.trainable_size
        return ScaffoldState(model.vector, trainable, np.zeros(trainable, np.float32))

    def order(self, state: ScaffoldState, round: int) -> Order:
        return Order("train", control=state.control)

    def step(self, state: ScaffoldState, aggregate: Aggregate) -> ScaffoldState:
        share = len(aggregate.clients) / self.clients
        # Of mean_i(c_i+ - c_i) = -c - mean_i(theta_i - theta) / (K eta).
        scale = np.float32(-share / (self.steps * self.learning_rate))
        with np.errstate(over="ignore"):  # which is found out right after
            control: Array = aggregate.vector[: state.trainable] * scale
        control += np.float32(1 - share) * state.control
        if not all_finite(control):
            raise RunError(
                "the control variate has NaN or infinity in it: choose a larger work.learning_rate"
            )
        model = moved(state.model, aggregate, trainable=state.trainable, rate=self.server_learning_rate)
        return ScaffoldState(model, state.trainable, control)
