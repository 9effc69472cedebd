"""What can happen to a round, and what a round can want done: the words between its machine and its driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedge.refusal import Refusal
from fedge.strategy import WorkKind

Phase = Literal["waiting", "joining", "sharing", "open", "consenting", "revealing", "closed", "abandoned"]


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
    culprits: tuple[str, ...] = ()
    """Others, whose messages make it impossible."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """A client's work on an order, which is to fetch, to compute and to deliver, is so far done: 1 to 1000."""

    client: str
    order: OrderId
    permille: int


@dataclass(frozen=True, slots=True)
class Advertised:
    """Secure aggregation: a client's keys for an order are here; it sums in this shard."""

    client: str
    order: OrderId
    shard: int = 0


@dataclass(frozen=True, slots=True)
class Shared:
    """Secure aggregation: a client has shared its seeds with the others."""

    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class Consented:
    """Secure aggregation: a client has consented to who survived."""

    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class Revealed:
    """Secure aggregation: a client has revealed its shares."""

    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class Unmasked:
    """Secure aggregation: the masks are off the sum."""

    order: OrderId


@dataclass(frozen=True, slots=True)
class Broken:
    """Secure aggregation: the masks cannot be taken off with what was revealed so far, or, if it is `final`, at all."""

    order: OrderId
    reason: str
    culprits: tuple[str, ...] = ()
    final: bool = False


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The timer that `StartTimer` asked for has run out."""

    order: OrderId
    phase: Phase


SecureEvent = Advertised | Shared | Consented | Revealed | Unmasked | Broken

Event = Joined | Left | Arrived | Failed | Progressed | DeadlinePassed | SecureEvent


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
    """The round is abandoned; drop what was folded.

    `culprits` are left out of the next attempt. `spent`: clients have revealed shares for it, and take part in no
    other attempt.
    """

    order: OrderId
    reason: str
    culprits: tuple[str, ...] = ()
    spent: bool = False


@dataclass(frozen=True, slots=True)
class Enlist:
    """Secure aggregation: these take part, each in the shard that it advertised for; tell them the roster."""

    order: OrderId
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mask:
    """Secure aggregation: these have shared, and mask with each other; hand them their envelopes."""

    order: OrderId
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Remind:
    """Secure aggregation: this client is back; tell it again what it may have missed."""

    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class Survive:
    """Secure aggregation: the inputs of these are in; ask them for their consent to that."""

    order: OrderId
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disclose:
    """Secure aggregation: show these the consents, and ask for their shares."""

    order: OrderId
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unmask:
    """Secure aggregation: take the masks off the sum of these clients' inputs, and say how it went."""

    order: OrderId
    clients: tuple[str, ...]


SecureEffect = Enlist | Mask | Remind | Survive | Disclose | Unmask

Effect = Send | Accept | Reject | Cancel | StartTimer | Close | GiveUp | SecureEffect
