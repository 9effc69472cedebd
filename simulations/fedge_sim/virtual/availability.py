"""When a client is there: its intervals, one after the other, from the beginning of virtual time to its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from fedge.seeds import derive_seed
from fedge.simulation import AvailabilityConfig
from fedge_sim.virtual.traces import Interval, beside, read_availability

HOUR = 3600.0
DAY = 24 * HOUR

Intervals = Callable[[str], Iterator[Interval]]
"""Of a client: [from, to) in seconds, in order."""


def availability_of(
    config: AvailabilityConfig, names: Sequence[str], *, seed: int, folder: Path | None, limit_s: float
) -> Intervals:
    """When each client is there, as the seed has it; nothing begins after `limit_s`.

    Raises:
        ConfigError: the trace cannot be read.
    """

    if config.kind == "always":
        return lambda name: iter([(0.0, math.inf)])
    path = beside(folder, config.trace) if config.trace is not None else None
    traced = read_availability(path, clients=len(names), period_s=config.period_s) if path is not None else []
    index = {name: at for at, name in enumerate(names)}

    def endless(name: str) -> Iterator[Interval]:
        generator = np.random.default_rng(derive_seed(seed, "availability", name))
        match config.kind:
            case "markov":
                return _markov(config, generator)
            case "diurnal":
                return _diurnal(config, generator, limit_s)
            case "charging":
                return _nights(config, generator, limit_s)
            case _:
                return _again(traced[index[name]], config.period_s)

    return lambda name: takewhile(lambda interval: interval[0] <= limit_s, endless(name))


def _markov(config: AvailabilityConfig, generator: np.random.Generator) -> Iterator[Interval]:
    """Two states, each left after an exponential time; the first as likely as it is in the long run."""
    share = config.online_s / (config.online_s + config.offline_s)
    now = 0.0 if generator.random() < share else generator.exponential(config.offline_s)
    while True:
        end = now + max(1.0, generator.exponential(config.online_s))
        yield now, end
        now = end + max(1.0, generator.exponential(config.offline_s))


def _diurnal(
    config: AvailabilityConfig, generator: np.random.Generator, limit_s: float
) -> Iterator[Interval]:
    """A draw for each slot, whose chance follows a cosine of the hour."""
    for slot in range(math.ceil(limit_s / config.slot_s) + 1):
        start = slot * config.slot_s
        hour = config.start_hour + start / HOUR
        height = 0.5 + 0.5 * math.cos(2 * math.pi * (hour - config.peak_hour) / 24)
        if generator.random() < config.least + (config.most - config.least) * height:
            yield start, start + config.slot_s


def _nights(config: AvailabilityConfig, generator: np.random.Generator, limit_s: float) -> Iterator[Interval]:
    """From the night before the beginning on, which may not be over then."""
    length = ((config.to_hour - config.from_hour) % 24 or 24.0) * HOUR
    jitter = config.jitter_hours * HOUR
    night = (config.from_hour - config.start_hour) * HOUR - DAY
    while night <= limit_s:
        start, end = (night + shift + generator.uniform(-jitter, jitter) for shift in (0.0, length))
        if generator.random() < config.most and end > 0:
            yield max(0.0, start), end
        night += DAY


def _again(intervals: Sequence[Interval], period_s: float | None) -> Iterator[Interval]:
    yield from intervals
    since = period_s
    while since is not None and period_s is not None:
        for start, end in intervals:
            yield since + start, since + end
        since += period_s
