"""`[simulation]` of a run.toml: how `fedge simulate` makes clients, and what happens to them.

A deployment ignores it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedge.config import Config, shown

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(gt=0, le=1e15)]


class FaultsConfig(Config):
    """`[simulation.faults]`: what goes wrong in a simulation, of which nothing does by default.

    All but the last two are probabilities, for each order that a client is given; a client has at most one of
    these faults at an order. A delay is of `delay_s` on average, in virtual time.
    """

    dropout: Probability = 0.0
    failure: Probability = 0.0
    straggler: Probability = 0.0
    corruption: Probability = 0.0
    duplicate: Probability = 0.0
    delay: Probability = 0.0
    delay_s: Positive = 60.0
    crash_every: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _exclusive(self) -> FaultsConfig:
        # An exact sum: 0.1, 0.2 and 0.7 are meant to be one.
        total = math.fsum(
            (self.dropout, self.failure, self.straggler, self.corruption, self.duplicate, self.delay)
        )
        if total > 1:
            raise ValueError(
                "expected dropout, failure, straggler, corruption, duplicate and delay to be at most 1 together (a "
                f"client has one of them at most), found {total:g}"
            )
        return self


class AdversariesConfig(Config):
    """`[simulation.adversaries]`: clients that lie, in a simulation; by default nobody does.

    `share` of the clients do `attack`: they send their update with its sign changed, or scaled up, times `factor`; or
    noise of `factor` times its norm; or all of them the same noise of that norm ("collusion"); or they train on labels
    of other classes; or all of them on the data of the first one, labelled so ("sybil"); or they label half of their
    examples, on which they put a trigger, as the class `target`, and send what they learn times `factor` ("backdoor":
    Bagdasaryan et al. 2020).
    """

    share: Fraction = 0.0
    attack: Literal["sign_flip", "scale", "noise", "label_flip", "backdoor", "collusion", "sybil"] = (
        "sign_flip"
    )
    factor: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    target: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


def _tuple(found: object) -> object:
    """A list, as TOML has it, is a tuple."""
    return tuple(found) if isinstance(found, list) else found


class Spread(Config):
    """How a quantity is spread over devices: lognormal about a `median` (`sigma` of its logarithm), uniform from `low`
    to `high`, or one of `values`, each as likely. In TOML a number is a quantity that all have.
    """

    median: Amount | None = None
    sigma: Annotated[float, Field(ge=0, le=10)] | None = None
    low: Amount | None = None
    high: Amount | None = None
    values: Annotated[tuple[Amount, ...], BeforeValidator(_tuple), Field(max_length=1000)] = ()

    @model_validator(mode="after")
    def _is_one(self) -> Spread:
        kinds = {
            "median and sigma": (self.median, self.sigma),
            "low and high": (self.low, self.high),
            "values": (self.values or None,),
        }
        given = [name for name, parts in kinds.items() if any(part is not None for part in parts)]
        if len(given) != 1 or any(part is None for part in kinds[given[0]]):
            raise ValueError(
                "expected a number, or a table of median and sigma, of low and high, or of values, found "
                f"{', '.join(sorted(self.model_fields_set)) or 'an empty table'}"
            )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"expected low to be at most high, found {self.low:g} and {self.high:g}")
        return self


def _spread(found: object) -> object:
    """A number is what all have."""
    if isinstance(found, int | float) and not isinstance(found, bool):
        return {"values": (found,)}
    if isinstance(found, dict | Spread):
        return found
    raise ValueError(f"expected a number, or a table of how it is spread, found {shown(found)}")


Quantity = Annotated[Spread, BeforeValidator(_spread)]


def _of(number: float) -> Spread:
    return Spread(values=(number,))


class DevicesConfig(Config):
    """`[simulation.devices]`: what clients' devices are like. With it a simulation has a clock, and an order takes as
    long as fetching the model, training and delivering take there.

    `compute` is in examples a second, links in megabits a second, each way of which has `latency_ms`. An order whose
    vectors do not fit in `memory_mb` fails. `dropout` is the chance that a device loses its link in the middle of an
    order, and its work with it; it is back after `absence_s` on average. `trace` is a CSV or JSON file of devices,
    beside the run's, whose columns take the place of these keys.
    """

    compute: Quantity = _of(1000.0)
    down_mbps: Quantity = _of(100.0)
    up_mbps: Quantity = _of(20.0)
    latency_ms: Quantity = _of(30.0)
    memory_mb: Quantity | None = None
    compute_watts: Quantity = _of(5.0)
    radio_watts: Quantity = _of(1.0)
    dropout: Probability = 0.0
    absence_s: Positive = 600.0
    trace: Annotated[str, Field(min_length=1, max_length=4096)] | None = None


class AvailabilityConfig(Config):
    """`[simulation.availability]`: when clients are there. With it a simulation has a clock.

    "always"; "markov": there for `online_s` on average, gone for `offline_s`, both exponential; "diurnal": in each
    slot of `slot_s` with a chance that goes from `least` to `most`, at `peak_hour`, and back in a day; "charging": from
    about `from_hour` to about `to_hour` (each `jitter_hours` earlier or later) in a night, with the chance `most`;
    "trace": as `trace` says, a CSV or JSON file beside the run's, again and again every `period_s` if that is given.
    The clock begins at `start_hour`.
    """

    kind: Literal["always", "markov", "diurnal", "charging", "trace"] = "always"
    start_hour: Annotated[float, Field(ge=0, lt=24)] = 0.0
    online_s: Positive = 3600.0
    offline_s: Positive = 3600.0
    slot_s: Annotated[float, Field(ge=60, le=86400)] = 3600.0
    least: Probability = 0.1
    most: Probability = 0.9
    peak_hour: Annotated[float, Field(ge=0, lt=24)] = 2.0
    from_hour: Annotated[float, Field(ge=0, lt=24)] = 22.0
    to_hour: Annotated[float, Field(ge=0, lt=24)] = 6.0
    jitter_hours: Annotated[float, Field(ge=0, le=6)] = 1.0
    trace: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    period_s: Annotated[float, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> AvailabilityConfig:
        if (self.kind == "trace") != (self.trace is not None):
            raise ValueError(
                f'trace: expected a file with kind = "trace", and only then, found kind = {self.kind!r}'
            )
        if self.period_s is not None and self.kind != "trace":
            raise ValueError(f'period_s: expected it with kind = "trace" alone, found kind = {self.kind!r}')
        if self.least > self.most:
            raise ValueError(f"least: expected at most {self.most:g}, which `most` is, found {self.least:g}")
        if self.kind == "charging":
            night = (self.to_hour - self.from_hour) % 24 or 24.0
            if night <= 2 * self.jitter_hours:
                raise ValueError(f"jitter_hours: expected less than half of the night's {night:g} hours")
            if night + 2 * self.jitter_hours >= 24:
                raise ValueError(
                    f"to_hour: expected nights that end before the next begins, found {night:g} hours"
                )
        return self


class Simulation(Config):
    """`[simulation]`: how `fedge simulate` makes clients; a deployment ignores it.

    `partition = "task"` lets the task's `data(site)` divide the data by `site.index` of `site.count`;
    the others divide the one data set that the task gives for index 0 of 1 (see `fedge_sim.partition`). `feature_skew`
    and `label_noise` change what each client has. Secure aggregation is "ideal", the sum in the ring without any keys,
    or the "protocol" itself; both give the same bits. With `devices` or `availability` there is virtual time, which
    ends a run at `time_limit_hours`.
    """

    clients: Count = 10
    partition: Literal["task", "iid", "dirichlet", "shards", "quantity", "groups", "time"] = "task"
    alpha: Positive = 0.5
    shards_per_client: Count = 2
    feature_skew: Annotated[float, Field(ge=0, le=10)] = 0.0
    label_noise: Fraction = 0.0
    secure_aggregation: Literal["ideal", "protocol"] = "ideal"
    faults: FaultsConfig = FaultsConfig()
    adversaries: AdversariesConfig = AdversariesConfig()
    devices: DevicesConfig | None = None
    availability: AvailabilityConfig | None = None
    time_limit_hours: Annotated[float, Field(gt=0, le=1e6)] = 8760.0

    @model_validator(mode="after")
    def _timed(self) -> Simulation:
        if self.faults.delay and not self.has_a_clock:
            raise ValueError(
                "faults.delay: expected virtual time, in which an update can be late by some seconds; add "
                "[simulation.devices], or choose faults.straggler, which is late by a whole round"
            )
        return self

    @property
    def has_a_clock(self) -> bool:
        """Whether there is virtual time: devices or their absence take some."""
        return self.devices is not None or self.availability is not None
