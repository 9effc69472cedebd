"""Named moments at which a process can be made to die or to fail: how crash tests choose theirs exactly.

    FEDGE_FAULT=checkpoint.rename:2           killed (SIGKILL) when it is there for the second time
    FEDGE_FAULT=store.commit:1:fail           a full disk from the first time on
    FEDGE_FAULT=store.commit:1:fail:3         a full disk, three times

An operator has no use for it; a process that starts with one says so.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from typing import Final, Literal, NoReturn, get_args

from fedge.config import nearest
from fedge.errors import ConfigError

VARIABLE: Final = "FEDGE_FAULT"

Action = Literal["kill", "fail"]

_EFFECTS: Final = ("send", "accept", "reject", "cancel", "starttimer", "close", "giveup", "finish")

COORDINATOR_POINTS: Final = (
    "recover.before",
    "recover.after",
    "submit.before",
    "submit.after",
    "event.before",
    *(f"effect.{effect}.{when}" for effect in _EFFECTS for when in ("before", "after")),
    "upload.chunk",
    "updates.before",
    "updates.after",
    "checkpoint.before",
    "checkpoint.half",
    "checkpoint.rename",
    "checkpoint.after",
    "witness.before",
    "witness.commit",
    "witness.after",
    "store.before",
    "store.commit",
    "store.after",
)
CLIENT_POINTS: Final = (
    "job.joined",
    "job.ordered",
    "job.fetched",
    "job.trained",
    "job.prepared",
    "update.half",
    "update.sent",
)
LEDGER_POINTS: Final = (
    "ledger.append",
    "ledger.half",
    "ledger.written",
    "ledger.synced",
    "ledger.head",
    "ledger.done",
)
"""A client's, too; apart because a run without privacy may not come to them."""
SUM_POINTS: Final = (
    "sum.begun",
    "sum.advertised",
    "sum.shared",
    "sum.opened",
    "sum.masked",
    "sum.consented",
    "sum.spent",
    "sum.revealed",
)
"""A client's, in a secure sum, in their order."""
SUMMING_POINTS: Final = tuple(
    f"effect.{effect}.{when}"
    for effect in ("enlist", "mask", "survive", "disclose", "unmask")
    for when in ("before", "after")
)
"""A coordinator's, in a secure sum, in their order."""
POINTS: Final = (*COORDINATOR_POINTS, *CLIENT_POINTS, *LEDGER_POINTS, *SUM_POINTS, *SUMMING_POINTS)


class Faults:
    """At most one armed point. Without one, to reach a point costs a comparison."""

    def __init__(self, point: str = "", *, at: int = 1, action: Action = "kill", times: int = 0) -> None:
        self._point = point
        self._wait = at
        self._action = action
        self._times = times

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Faults:
        """What FEDGE_FAULT says.

        Raises:
            ConfigError: it names no point or no action.
        """
        text = environment.get(VARIABLE, "")
        if not text:
            return cls()
        point, at, action, times, *rest = [*text.split(":"), *("", "", "")][: 4 + text.count(":")]
        if point not in POINTS:
            raise ConfigError(
                f"{VARIABLE}: expected a point of failure, found {point!r}; {nearest(point, POINTS)}"
            )
        numbers = (at or "1", times or "0")
        if any(rest) or (action or "kill") not in get_args(Action) or not all(n.isdecimal() for n in numbers):
            raise ConfigError(f"{VARIABLE}: expected POINT[:AT[:kill|fail[:TIMES]]], found {text!r}")
        return cls(
            point, at=int(numbers[0]), action="fail" if action == "fail" else "kill", times=int(numbers[1])
        )

    @property
    def armed(self) -> str:
        """The point at which something will happen; empty if nothing will."""
        return self._point

    def reach(self, point: str) -> None:
        """The process is at a point.

        Raises:
            OSError: the point is armed to fail.
        """
        if point == self._point:
            self._strike()

    def _strike(self) -> None:
        self._wait -= 1
        if self._wait > 0:
            return
        if self._action == "kill":
            _die()
        if self._times and -self._wait >= self._times:
            self._point = ""
            return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")
