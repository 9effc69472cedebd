"""Typed refusals: the reasons with which a site, a coordinator or a round says no.

A refusal is a value that crosses the wire. Its code is for programs, its message for people; the
message never carries data, only names, sizes and limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, unique


@unique
class RefusalCode(IntEnum):
    """Why something was refused. The numbers are part of the wire format: never reuse one."""

    # The site's policy (the gate, before or after training).
    TASK_NOT_ALLOWED = 1
    COORDINATOR_NOT_ALLOWED = 2
    PROTECTION_UNAVAILABLE = 3
    STRATEGY_NOT_ALLOWED = 4
    PROTECTION_TOO_WEAK = 5
    WORK_NOT_ALLOWED = 6
    BUDGET_EXHAUSTED = 7
    LEDGER_UNUSABLE = 8
    # The site's task.
    TASK_UNAVAILABLE = 10
    NO_DATA = 11
    LAYOUT_MISMATCH = 12
    TASK_FAILED = 13
    MODEL_NOT_PRIVATE = 14
    # The site's worker.
    WORKER_CRASHED = 20
    WORKER_HUNG = 21
    OUT_OF_MEMORY = 22
    UPDATE_LOST = 23
    # An update, as the gate or the coordinator sees it.
    NOT_FINITE = 30
    WRONG_LENGTH = 31
    WRONG_DIGEST = 32
    TOO_LARGE = 33
    BAD_WEIGHT = 34
    BAD_METRICS = 35
    # A round.
    LATE = 40
    DUPLICATE = 41
    NOT_ASKED = 42
    STALE = 43
    RUN_ENDED = 44
    UNKNOWN_RUN = 45
    # Secure aggregation, as a site or the coordinator sees it.
    ROSTER_INVALID = 60
    CONTEXT_DIFFERS = 61
    SHARES_INVALID = 62
    SURVIVORS_INVALID = 63
    CONSENTS_INVALID = 64
    ROUND_SPENT = 65
    # The work was stopped on request.
    CANCELLED = 50


@dataclass(frozen=True, slots=True)
class Refusal:
    """A typed no: `code` for programs, `message` (at most a few hundred characters) for people."""

    code: RefusalCode
    message: str

    def __str__(self) -> str:
        return f"{self.code.name.lower()}: {self.message}"
