"""What clients' devices are like, and how long an order takes on one and what energy it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedge.seeds import derive_seed
from fedge.simulation import DevicesConfig, Spread
from fedge_sim.virtual.traces import Row, beside, chosen_row, read_devices

_MEGA = 1e6


@dataclass(frozen=True, slots=True)
class Device:
    """`compute` in examples a second, links in bits a second, `latency_s` of each way; `memory` in bytes, `dropout` the
    chance to be lost in the middle of an order."""

    compute: float
    down: float
    up: float
    latency_s: float
    memory: float
    compute_watts: float
    radio_watts: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Load:
    """What an order is for a device: bytes to fetch and to deliver, and examples to go through."""

    down: int
    up: int
    examples: int


@dataclass(frozen=True, slots=True)
class Course:
    """How an order goes on a device: seconds of fetching, computing and delivering, one after the other."""

    fetch_s: float
    compute_s: float
    deliver_s: float
    compute_watts: float
    radio_watts: float

    @classmethod
    def of(cls, device: Device, load: Load) -> Course:
        return cls(
            device.latency_s + 8 * load.down / device.down,
            load.examples / device.compute,
            device.latency_s + 8 * load.up / device.up,
            device.compute_watts,
            device.radio_watts,
        )

    @property
    def seconds(self) -> float:
        """From the order to the update's arrival."""
        return self.fetch_s + self.compute_s + self.deliver_s

    def joules(self, elapsed_s: float) -> float:
        """The energy that it has taken after so long."""
        fetched = min(elapsed_s, self.fetch_s)
        computed = min(max(0.0, elapsed_s - self.fetch_s), self.compute_s)
        delivered = min(max(0.0, elapsed_s - self.fetch_s - self.compute_s), self.deliver_s)
        return self.compute_watts * computed + self.radio_watts * (fetched + delivered)


class Devices:
    """Those of a population, each as the seed has it.

    Raises:
        ConfigError: the trace cannot be read.
    """

    def __init__(
        self, config: DevicesConfig, names: Sequence[str], *, seed: int, folder: Path | None
    ) -> None:
        self._config, self._seed = config, seed
        self._index = {name: index for index, name in enumerate(names)}
        self._rows = read_devices(beside(folder, config.trace)) if config.trace is not None else []
        self._made: dict[str, Device] = {}

    def of(self, name: str) -> Device:
        """A client's."""
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Device:
        config, generator = self._config, np.random.default_rng(derive_seed(self._seed, "device", name))
        drawn = int(generator.integers(1 << 62))
        row: Row = chosen_row(self._rows, self._index[name], len(self._index), drawn) if self._rows else {}

        def quantity(key: str, spread: Spread) -> float:
            own = _draw(spread, generator)  # drawn in any case, so that a column changes nothing but itself
            return row.get(key, own)

        return Device(
            compute=quantity("compute", config.compute),
            down=_MEGA * quantity("down_mbps", config.down_mbps),
            up=_MEGA * quantity("up_mbps", config.up_mbps),
            latency_s=quantity("latency_ms", config.latency_ms) / 1000,
            memory=_MEGA * quantity("memory_mb", config.memory_mb) if config.memory_mb else _memory(row),
            compute_watts=quantity("compute_watts", config.compute_watts),
            radio_watts=quantity("radio_watts", config.radio_watts),
            dropout=row.get("dropout", config.dropout),
        )


def _memory(row: Row) -> float:
    return _MEGA * row["memory_mb"] if "memory_mb" in row else math.inf


def _draw(spread: Spread, generator: np.random.Generator) -> float:
    if spread.median is not None and spread.sigma is not None:
        return max(spread.median * math.exp(generator.normal(0.0, spread.sigma)), 1e-12)
    if spread.low is not None and spread.high is not None:
        return float(generator.uniform(spread.low, spread.high))
    return spread.values[int(generator.integers(len(spread.values)))]
