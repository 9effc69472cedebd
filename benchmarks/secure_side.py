"""The sides of S1 to S6: cohorts, played once for all repetitions, and fresh processes for what is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import FEDGE, FLOOR, Options, Sample, Side, Take, after_warm_up
from benchmarks.peers import by_peers, is_installed, missing
from benchmarks.processes import module, run_json

PEERS = {"flower": "Flower", "ckks": "TenSEAL CKKS"}
_PEERS = "benchmarks.floors.peers"
_DEADLINE_S = 900.0


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who sums what. `drops` are percentages that go away before they hand in their vector."""

    sites: int
    size: int
    suite: int = 1
    bits: int = 32
    drops: tuple[int, ...] = (0,)

    def file(self, options: Options) -> Path:
        """The session that they play: it is played when it is first asked for. Beside it, in JSON, its `endings`."""
        path = options.scratch / "-".join(map(str, ("cohort", self.sites, self.size, self.suite, self.bits)))
        if not path.exists():
            sizes = ("--sites", self.sites, "--size", self.size, "--suite", self.suite, "--bits", self.bits)
            arguments = module("benchmarks.cohort", path, *sizes, "--drops", *self.drops)
            found, _ = run_json(arguments, log=path.with_suffix(".log"), deadline_s=_DEADLINE_S)
            path.with_suffix(".json").write_text(json.dumps(found))
        return path

    def ending(self, options: Options, drop: int) -> dict[str, int]:
        """How many survive if so many percent drop out, and what is to be taken off their sum."""
        found: dict[str, int] = json.loads(self.file(options).with_suffix(".json").read_text())[str(drop)]
        return found


def fedge(name: str, *arguments: object, options: Options) -> Side:
    """fedge's way, by a module that prints what it has measured."""
    return Side.of(FEDGE, lambda: sample(module(f"benchmarks.{name}", *arguments), options))


def on_cohort(name: str, cohort: Cohort, *arguments: object, options: Options) -> Side:
    """fedge's way, by a module that works on a cohort's session."""

    @contextmanager
    def open() -> Iterator[Take]:
        yield partial(sample, module(f"benchmarks.{name}", cohort.file(options), *arguments), options)

    return Side(FEDGE, open)


def floor(what: str, *arguments: object, options: Options, name: str = FLOOR) -> Side:
    """One of floors/secure.py."""
    return Side.of(name, lambda: sample(module("benchmarks.floors.secure", what, *arguments), options))


def server_floor(cohort: Cohort, drop: int, *, options: Options) -> Side:
    """As many vectors, masks, agreements and signatures as the coordinator of a cohort cannot do without."""

    @contextmanager
    def open() -> Iterator[Take]:
        found = cohort.ending(options, drop)
        counts = ("--vectors", found["survivors"], "--signatures", 2 * found["survivors"])
        pairs = ("--masks", found["masks"], "--agreements", found["agreements"], "--size", cohort.size)
        yield partial(sample, module("benchmarks.floors.secure", "work", *counts, *pairs), options)

    return Side(FLOOR, open)


def peers(
    what: str, *whose: str, arguments: tuple[object, ...] = (), how: str = "", options: Options
) -> list[Side]:
    """Other implementations at the same work, those that are installed. `how` is said behind their names."""

    def side(one: str) -> Side:
        command = by_peers(_PEERS, what, one, *arguments)
        return Side.of(f"{PEERS[one]}{how}", lambda: sample(command, options))

    return [side(one) for one in whose if _has(one)]


def without(*whose: str) -> str:
    """What a case's title says about those that are not."""
    return missing({PEERS[one]: _has(one) for one in whose})


def sample(command: list[str], options: Options) -> Sample:
    """A process that prints values and lists of values, of which the first of each warms up."""
    found, _ = run_json(command, log=options.scratch / "secure.log", deadline_s=_DEADLINE_S)
    return Sample({name: _value(value) for name, value in found.items()})


def _value(found: Any) -> float:
    several = isinstance(found, list)
    return after_warm_up(found) if several and len(found) > 1 else float(found[0] if several else found)


def _has(whose: str) -> bool:
    return is_installed(_PEERS, whose)
