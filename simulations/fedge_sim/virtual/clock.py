"""The event queue of virtual time: who finishes, comes, goes and is overdue next, and what energy it has taken.

It knows nothing of rounds: the driver tells it what was asked of whom and what no longer counts, and hands on what
happens to the same machine that a deployment has.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedge.errors import RunError
from fedge.events import DeadlinePassed, Joined, Left, OrderId, Send
from fedge.run import RunConfig
from fedge.seeds import derive_seed
from fedge.simulation import AvailabilityConfig
from fedge_sim.virtual.availability import HOUR, Intervals, availability_of
from fedge_sim.virtual.devices import Course, Devices, Load
from fedge_sim.virtual.traces import Interval

_BITS = 53


@dataclass(frozen=True, slots=True)
class Finished:
    """A client's update for an order is here, if it is still at it."""

    send: Send


@dataclass(frozen=True, slots=True)
class Overfull:
    """An order does not fit in the memory of a client's device."""

    send: Send


@dataclass(frozen=True, slots=True)
class Due:
    """A deadline has come, unless it was changed."""

    event: DeadlinePassed
    at_s: float


Happening = Finished | Overfull | Joined | Left | Due
"""What a coordinator would see of clients that come and go is its own event."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """How the work that was begun under a number ends, unless it was stopped before: with an update, for want of
    memory, or with the client lost in the middle."""

    send: Send
    number: int
    how: Literal["finished", "overfull", "lost"]


@dataclass(frozen=True, slots=True)
class _Work:
    """Since when a client is at an order, how it goes, and the number that it has; `ends`: whether it is not lost."""

    since_s: float
    course: Course
    number: int
    ends: bool = True


@dataclass(frozen=True, slots=True)
class _Back:
    """From where it was lost."""

    client: str


@dataclass(frozen=True, slots=True)
class _Turned:
    """An interval of a client begins or ends."""

    client: str


_Queued = Due | _Ended | _Back | _Turned


class Clock:
    """Virtual time, in seconds from the beginning of the run.

    Without `devices` an order takes no time. `joules` is what orders have taken, those that came to nothing included;
    `wasted` how many were called off, or lost with their client.
    """

    def __init__(
        self,
        names: Sequence[str],
        intervals: Intervals,
        devices: Devices | None,
        *,
        limit_s: float,
        absence_s: float,
        seed: int,
    ) -> None:
        self._devices, self._seed = devices, seed
        self._limit_s, self._absence_s = limit_s, absence_s
        self.now_s = self.joules = 0.0
        self.wasted = 0
        self._queue: list[tuple[float, int, _Queued]] = []
        self._pushed = 0
        self._begun: dict[Send, _Work] = {}
        self._number = 0
        self._again: dict[Send, int] = {}
        self._intervals: dict[str, Iterator[Interval]] = {}
        self._until: dict[str, Interval] = {}
        self._available: set[str] = set()
        self._lost: set[str] = set()
        for name in names:
            self._begin(name, intervals(name))

    @property
    def present(self) -> frozenset[str]:
        """Who is there."""
        return frozenset(self._available - self._lost)

    def give(self, send: Send, load: Load, memory: int) -> None:
        """A client begins with an order, for which its device needs `memory` bytes."""
        device = self._devices.of(send.client) if self._devices is not None else None
        course = Course.of(device, load) if device is not None else Course(0.0, 0.0, 0.0, 0.0, 0.0)
        chance, where = (self._drawn(what, send) for what in ("dropout", "where"))
        if device is not None and device.memory < memory:
            self._begin_work(send, course, course.fetch_s, "overfull")
        elif device is not None and chance < device.dropout:
            self._begin_work(send, course, where * course.seconds, "lost")
        else:
            self._begin_work(send, course, course.seconds, "finished")

    def _begin_work(
        self, send: Send, course: Course, seconds: float, how: Literal["finished", "overfull", "lost"]
    ) -> None:
        self._number += 1
        self._begun[send] = _Work(self.now_s, course, self._number, how != "lost")
        self._push(seconds, _Ended(send, self._number, how))

    def postpone(self, send: Send, seconds: float) -> None:
        """A finished order's update is on its way for so much longer."""
        self._begin_work(send, Course(0.0, 0.0, seconds, 0.0, 0.0), seconds, "finished")

    def comes_to_something(self, send: Send) -> bool:
        """Whether an order that was begun will be finished, as far as its client's device and hours go."""
        work = self._begun.get(send)
        if work is None or not work.ends:
            return False
        return work.since_s + work.course.seconds <= self._until[send.client][1]

    def permille(self, send: Send) -> int:
        """How far an order is, 1 to 1000."""
        work = self._begun[send]
        share = (self.now_s - work.since_s) / max(work.course.seconds, 1e-9)
        return min(1000, max(1, math.floor(1000 * share)))

    def stop(self, send: Send, *, wasted: bool) -> None:
        """A client has done with an order, or it does not count any more."""
        work = self._begun.pop(send, None)
        if work is None:
            return
        self.joules += work.course.joules(self.now_s - work.since_s)
        self.wasted += wasted
        if wasted:  # should it be given again, its luck is another
            self._again[send] = self._again.get(send, 0) + 1

    def remind(self, event: DeadlinePassed, seconds: float) -> float:
        """Set a timer; when it is due."""
        at = self.now_s + seconds
        self._push(seconds, Due(event, at))
        return at

    def next(self) -> Happening:
        """The next that happens; time goes on to then.

        Raises:
            RunError: nothing will, or not within the limit.
        """
        while self._queue:
            self.now_s, _, what = heapq.heappop(self._queue)
            if self.now_s > self._limit_s:
                break
            match what:
                case _Ended(send, number, how):
                    if send in self._begun and self._begun[send].number == number:
                        return self._end(send, how)
                case _Back(client):
                    self._lost.discard(client)
                    if client in self._available:
                        return Joined(client)
                case _Turned(client):
                    if (turned := self._turn(client)) is not None:
                        return turned
                case Due():
                    return what
        raise RunError(
            f"nothing more happens within {self._limit_s / HOUR:g} hours of virtual time "
            f"(simulation.time_limit_hours), of which {min(self.now_s, self._limit_s) / HOUR:.3g} have passed: the "
            "clients that a round needs are not there at once (simulation.availability), or are too slow"
        )

    def _end(self, send: Send, how: Literal["finished", "overfull", "lost"]) -> Happening:
        if how == "finished":
            return Finished(send)
        if how == "overfull":
            return Overfull(send)
        self._lost.add(send.client)
        absence = -self._absence_s * math.log(1.0 - self._drawn("absence", send))
        self._push(absence, _Back(send.client))
        return Left(send.client)

    def _turn(self, client: str) -> Joined | Left | None:
        """An interval's beginning or end, if it is one to others."""
        if client not in self._available:
            self._available.add(client)
            self._push_at(self._until[client][1], _Turned(client))
            return Joined(client) if client not in self._lost else None
        following = next(self._intervals[client], None)
        if following is not None and following[0] <= self.now_s:
            self._until[client] = following
            self._push_at(following[1], _Turned(client))
            return None
        self._available.discard(client)
        if following is not None:
            self._until[client] = following
            self._push_at(following[0], _Turned(client))
        return Left(client) if client not in self._lost else None

    def _begin(self, name: str, intervals: Iterator[Interval]) -> None:
        first = next(intervals, None)
        if first is None:
            return
        self._intervals[name], self._until[name] = intervals, first
        if first[0] <= 0:
            self._available.add(name)
        if first[0] > 0 or math.isfinite(first[1]):
            self._push_at(first[0] if first[0] > 0 else first[1], _Turned(name))

    def _push(self, seconds: float, what: _Queued) -> None:
        self._push_at(self.now_s + seconds, what)

    def _push_at(self, at_s: float, what: _Queued) -> None:
        if math.isfinite(at_s):
            self._pushed += 1  # of two at the same time the first to be known comes first
            heapq.heappush(self._queue, (at_s, self._pushed, what))

    def _drawn(self, what: str, send: Send) -> float:
        """A number in [0, 1) that is this order's alone, and another each time that it is given."""
        order: OrderId = send.order
        again = self._again.get(send, 0)
        drawn = derive_seed(
            self._seed, "clock", what, order.kind, order.round, order.attempt, again, send.client
        )
        return float((drawn >> (63 - _BITS)) / 2**_BITS)


def clock_of(run: RunConfig, names: Sequence[str], *, folder: Path | None) -> Clock | None:
    """A run's, if it has virtual time; files that it names are beside it, in `folder`.

    Raises:
        ConfigError: one of them cannot be read.
    """
    settings = run.simulation
    if not settings.has_a_clock:
        return None
    limit_s = settings.time_limit_hours * HOUR
    availability = settings.availability or AvailabilityConfig()
    devices = settings.devices
    return Clock(
        names,
        availability_of(availability, names, seed=run.seed, folder=folder, limit_s=limit_s),
        Devices(devices, names, seed=run.seed, folder=folder) if devices is not None else None,
        limit_s=limit_s,
        absence_s=devices.absence_s if devices is not None else 1.0,
        seed=run.seed,
    )
