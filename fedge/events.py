"""What can happen to a round, and what a round can want done: the words between its machine and its driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedge.refusal import Refusal
from fedge.strategy import WorkKind

Phase = Literal["waiting", "open", "closed", "abandoned"]


@dataclass(frozen=True, slots=True)
class OrderId:
    """Which order: of what kind, of which round (from 1), and which attempt at it (from 1)."""

    kind: WorkKind
    round: int
    attempt: int = 1

    def __str__(self) -> str:
        again = f" (attempt {self.attempt})" if self.attempt > 1 else ""
        return f"{self.kind} order of round {self.round}{again}"


# Events: what happened.


@dataclass(frozen=True, slots=True)
class Joined:
    """A client is connected and ready for this run; after a lost link, again."""

    client: str


@dataclass(frozen=True, slots=True)
class Left:
    """A client's link is gone."""

    client: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A complete, well-formed update is here."""

    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class Failed:
    """A client says that it cannot do this order, or what it sent was refused."""

    client: str
    order: OrderId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Progressed:
    """A client's work on an order, which is to fetch, to compute and to deliver, is so far done: 1 to 1000."""

    client: str
    order: OrderId
    permille: int


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The timer that `StartTimer` asked for has run out."""

    order: OrderId
    phase: Phase


Event = Joined | Left | Arrived | Failed | Progressed | DeadlinePassed


# Effects: what the driver is to do, in this order.


@dataclass(frozen=True, slots=True)
class Send:
    """Send the order, with the current model, to the client."""

    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class Accept:
    """Fold the client's update into the aggregate and tell it so."""

    client: str
    order: OrderId
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class Reject:
    """Tell the client that its update does not count, and why."""

    client: str
    order: OrderId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell the client that its work on the order is no longer wanted."""

    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Feed `DeadlinePassed(order, phase)` back after so many seconds; a new timer replaces its equal."""

    order: OrderId
    phase: Phase
    seconds: float


@dataclass(frozen=True, slots=True)
class Close:
    """Everything accepted is in: finish the aggregate, and for training make the strategy's step."""

    order: OrderId
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The round is abandoned; drop what was folded."""

    order: OrderId
    reason: str


Effect = Send | Accept | Reject | Cancel | StartTimer | Close | GiveUp
