"""Measuring: interleaved samples of several sides, their spread, ratios within a repetition, and memory.

A side is one way to do a workload: the floor, fedge, or something shown for information. Every
repetition takes one sample of each side in turn, so that what the machine does meanwhile falls on all.
"""

from __future__ import annotations

import statistics
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

FLOOR, FEDGE = "floor", "fedge"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a side: named values, each a median over the run's rounds. Units are in the names.

    `series` is only written down: what was seen in the course of the run.
    """

    values: dict[str, float]
    rounds: int = 0
    series: dict[str, list[float]] = field(default_factory=dict)


Take = Callable[[], Sample]


@dataclass(frozen=True, slots=True)
class Side:
    """`open` makes what all samples of the side share, and ends it; it gives what takes one sample."""

    name: str
    open: Callable[[], AbstractContextManager[Take]]

    @classmethod
    def of(cls, name: str, take: Take) -> Side:
        """A side whose samples share nothing."""
        return cls(name, lambda: nullcontext(take))


@dataclass(frozen=True, slots=True)
class Spread:
    """Several values of one thing."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Outcome:
    """All samples of a case: one list a side, in the order of repetitions, and what went wrong."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    crashes: dict[str, str] = field(default_factory=dict)

    def spread(self, side: str, name: str, *, per: float = 1.0) -> Spread | None:
        """The spread of one value, in units of `per`, or None if it was not measured."""
        values = [s.values[name] / per for s in self.samples.get(side, []) if name in s.values]
        return Spread.of(values) if values else None

    def compare(
        self, side: str, other: str, number: Callable[[Sample, Sample], float | None]
    ) -> Spread | None:
        """The spread of a number of two samples, each pair from the same repetition."""
        pairs = zip(self.samples.get(side, []), self.samples.get(other, []), strict=False)
        numbers = [found for pair in pairs if (found := number(*pair)) is not None]
        return Spread.of(numbers) if numbers else None

    def ratio(self, other: str, name: str = "seconds") -> Spread | None:
        """The spread of fedge's value over another side's, computed within each repetition."""
        return self.compare(FEDGE, other, lambda a, b: _quotient(a.values.get(name), b.values.get(name)))


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit on something of the outcome. `value` gives None where it was not measured."""

    text: str
    limit: float
    value: Callable[[Outcome], Spread | None]
    unit: str = "x"

    @classmethod
    def of_fedge(cls, text: str, limit: float, name: str, unit: str = "x", *, per: float = 1.0) -> Goal:
        """A limit on one of fedge's own values, in units of `per`."""
        return cls(text, limit, lambda found: found.spread(FEDGE, name, per=per), unit)


@dataclass(frozen=True, slots=True)
class Case:
    """A workload at one size: its sides, in the order of measuring, and its goals. `compares` is the value
    of which ratios are made."""

    name: str
    title: str
    sides: tuple[Side, ...]
    goals: tuple[Goal, ...] = ()
    compares: str = "seconds"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks of every workload. `scratch` is a folder for keys, logs and run files."""

    scratch: Path
    quick: bool = False
    large: bool = False


def run_case(case: Case, *, repeat: int, say: Callable[[str], None]) -> Outcome:
    """Open every side, take `repeat` interleaved samples of each, and close them.

    A side that crashes is reported and left out from then on; the others go on.
    """
    outcome = Outcome({side.name: [] for side in case.sides})
    with ExitStack() as stack:
        takes: dict[str, Take] = {}
        for side in case.sides:
            try:
                takes[side.name] = stack.enter_context(side.open())
            except Exception as error:  # noqa: BLE001  # one side's crash is a finding about that side
                _crashed(outcome, side.name, error)
        for number in range(1, repeat + 1):
            for name in list(takes):
                say(f"{case.name} {name} {number}/{repeat}")
                try:
                    outcome.samples[name].append(takes[name]())
                except Exception as error:  # noqa: BLE001  # see above
                    _crashed(outcome, name, error)
                    del takes[name]
    return outcome


def as_json(case: Case, outcome: Outcome, *, repeat: int) -> dict[str, Any]:
    """A case's outcome as plain values."""
    sides: dict[str, Any] = {}
    for name, samples in outcome.samples.items():
        values = sorted({value for sample in samples for value in sample.values})
        spreads = {value: asdict(spread) for value in values if (spread := outcome.spread(name, value))}
        sides[name] = {"values": spreads, "samples": [asdict(sample) for sample in samples]}
        if name in outcome.crashes:
            sides[name]["crash"] = outcome.crashes[name]
    ratios = {}
    for name in outcome.samples:
        if name != FEDGE and (ratio := outcome.ratio(name, case.compares)):
            ratios[f"{FEDGE}/{name}"] = asdict(ratio)
    goals = []
    for goal in case.goals:
        spread = goal.value(outcome)
        goals.append(
            {
                "text": goal.text,
                "limit": goal.limit,
                "unit": goal.unit,
                "value": asdict(spread) if spread else None,
                "met": spread.median <= goal.limit if spread else None,
            }
        )
    return {"title": case.title, "repeat": repeat, "sides": sides, "ratios": ratios, "goals": goals}


def after_warm_up(seconds: Sequence[float], *, warm_up: int = 1) -> float:
    """The median of what follows the first rounds, which load code and fill caches."""
    if len(seconds) <= warm_up:
        raise ValueError(f"expected more than {warm_up} rounds, the warm-up; found {len(seconds)}")
    return statistics.median(seconds[warm_up:])


def round_seconds(history: Sequence[float], period: Sequence[float]) -> dict[str, float]:
    """Medians after the first of what fedge told and of what was seen from outside. `seconds`, which the
    goals are about, is the longer of the two."""
    told, seen = after_warm_up(history), after_warm_up(period)
    return {"seconds": max(told, seen), "history_seconds": told, "period_seconds": seen}


def memory(pid: int, key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of one process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise ValueError(f"expected {key} in the status of process {pid}, found none")


def forget_peak(pid: int) -> None:
    """Begin the process's `VmHWM` anew from what it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class PeakOfTree:
    """The largest sum of resident memory of a process and its descendants, sampled while open.

    Pages that processes share are counted once in each, so a child counts only from the second time that
    it is seen: just forked, it is its parent again.
    """

    def __init__(self, pid: int, *, every_s: float = 0.25) -> None:
        self._pid, self._every_s = pid, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> PeakOfTree:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = {self._pid}
        while not self._done.wait(self._every_s):
            try:
                root = psutil.Process(self._pid)
                found = [root, *root.children(recursive=True)]
                total = sum(process.memory_info().rss for process in found if process.pid in seen)
            except psutil.Error:  # one ended between being listed and being read
                continue
            seen = {process.pid for process in found}
            self.peak_bytes = max(self.peak_bytes, total)


def wait_until(true: Callable[[], bool], *, deadline_s: float, every_s: float = 0.05, what: str) -> None:
    """Poll until it is true.

    Raises:
        TimeoutError: it did not become so in time.
    """
    end = time.monotonic() + deadline_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"expected {what} within {deadline_s:g} s")
        time.sleep(every_s)


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _crashed(outcome: Outcome, side: str, error: Exception) -> None:
    outcome.crashes[side] = "".join(traceback.format_exception(error)).strip()
