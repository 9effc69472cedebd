"""Data from nothing but a seed: machines whose bearings wear out, and roads that fill and empty.

Made for simulations of factories and cities: each machine and each road is somebody's (`groups`), and no two are alike.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt
from torch.utils.data import TensorDataset

from fedge.seeds import derive_seed
from fedge_sim.data.dataset import dataset_of

FAULTS: Final = ("healthy", "inner race", "outer race", "ball", "imbalance")
"""The classes of `vibration`, by their numbers."""

_RATE_HZ = 6400
_TIMES_A_TURN: Final = {"inner race": 5.42, "outer race": 3.58, "ball": 4.71}
"""How often a defect is struck in a turn of the shaft, for a bearing of nine balls."""
_DAY = 288
"""Readings in a day: one every five minutes."""


def vibration(*, machines: int, windows: int, length: int = 256, seed: int = 0) -> TensorDataset:
    """`windows` windows of an accelerometer on each of `machines`, sampled at 6.4 kHz: float32[machines * windows,
    length], and which of `FAULTS` the machine has, int64. `groups` are the machines.

    A defect rings the bearing's resonance each time it is struck, at its own multiple of the shaft's speed; imbalance
    is a large sine at that speed itself. Speeds, resonances and noise differ from machine to machine.

    Raises:
        ValueError: a number is below 1.
    """
    _check(machines=machines, windows=windows, length=length)
    parts, labels = [], []
    for machine in range(machines):
        generator = np.random.default_rng(derive_seed(seed, "vibration", machine))
        speed_hz, resonance_hz = generator.uniform(20, 60), generator.uniform(1200, 2600)
        noise, damping = generator.uniform(0.2, 0.6), generator.uniform(300, 900)
        for _ in range(windows):
            fault = int(generator.integers(len(FAULTS)))
            time_s = generator.uniform(0, 1) + np.arange(length) / _RATE_HZ
            signal = generator.normal(0, noise, length)
            signal += 0.5 * np.sin(2 * math.pi * speed_hz * time_s)
            if FAULTS[fault] == "imbalance":
                signal += 2.5 * np.sin(2 * math.pi * speed_hz * time_s)
            elif fault:
                struck_hz = speed_hz * _TIMES_A_TURN[FAULTS[fault]]
                since = np.mod(time_s, 1 / struck_hz)
                signal += 3 * np.exp(-damping * since) * np.sin(2 * math.pi * resonance_hz * since)
            parts.append(signal)
            labels.append(fault)
    return dataset_of(np.array(parts), np.array(labels), np.repeat(np.arange(machines), windows))


def traffic(*, roads: int, days: int, history: int = 12, seed: int = 0) -> TensorDataset:
    """The flow on each of `roads`, every five minutes: from the last `history` readings and the time of day (its sine
    and cosine), float32[n, history + 2], the next one, float32[n, 1]. `groups` are the roads; examples of a road are in
    the order of time.

    Each road has a morning and an evening peak of its own, weekends without them, and days that are worse than others.

    Raises:
        ValueError: a number is below 1.
    """
    _check(roads=roads, days=days, history=history)
    inputs, targets, groups = [], [], []
    for road in range(roads):
        flow = _flow(np.random.default_rng(derive_seed(seed, "traffic", road)), days)
        at = np.arange(history, len(flow))
        window = np.stack([flow[at - back] for back in range(history, 0, -1)], axis=1)
        angle = 2 * math.pi * (at % _DAY) / _DAY
        inputs.append(np.column_stack([window, np.sin(angle), np.cos(angle)]))
        targets.append(flow[at][:, None])
        groups.append(np.full(len(at), road))
    return dataset_of(np.concatenate(inputs), np.concatenate(targets), np.concatenate(groups))


def _flow(generator: np.random.Generator, days: int) -> npt.NDArray[np.float64]:
    """Vehicles, in units of the road's capacity."""
    hours = np.arange(_DAY) * 24 / _DAY
    morning, evening = generator.normal(8, 0.7), generator.normal(17.5, 0.7)
    weight, base = generator.uniform(0.2, 0.8), generator.uniform(0.1, 0.3)
    first = int(generator.integers(7))
    parts = []
    for day in range(days):
        peaks = weight * np.exp(-((hours - morning) ** 2) / 2.5) + (1 - weight) * np.exp(
            -((hours - evening) ** 2) / 4
        )
        weekend = (first + day) % 7 >= 5
        busy = generator.lognormal(0, 0.1) * (0.35 if weekend else 1.0)
        noon = 0.2 * np.exp(-((hours - 13) ** 2) / 18)
        parts.append(base * noon / 0.2 + noon + 0.7 * busy * peaks)
    flow = np.concatenate(parts)
    return np.maximum(flow + generator.normal(0, 0.02, len(flow)), 0.0)


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected 1 or more, found {number}")
