"""What the store keeps of a run, as values. They hold numbers, names and digests; vectors are in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fedge.events import OrderId
from fedge.history import Row
from fedge.run_state import Status


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it was submitted. `layout` is the encoded layout of its model, `strategy` its repr."""

    run_id: str
    name: str
    run_toml: str
    layout: bytes = field(repr=False)
    strategy: str
    submitted_at: float
    submitted_by: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A strategy's state after `round` committed rounds, in a file that its digest names."""

    round: int
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class KeptUpdate:
    """An accepted update of an open order. `order` and `client` are its idempotency key.

    Its vector is `inline` if it is small, else in the spool's file `place`; `digest` tells whether what is
    found there is it.
    """

    order: OrderId
    client: str
    num_examples: int
    size: int
    digest: bytes
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    staleness: int = 0
    place: str = ""
    inline: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run: everything in it belongs together, and is kept as one or not at all.

    `machine` is the run's state machine as JSON. `rows` are those that are new or have changed since the
    last moment that was kept, and so are `updates`. `cohorts` says of each open order who was asked, and
    what became of it; updates for other orders are forgotten. `checkpoint` is set if rounds were committed.
    """

    run_id: str
    status: Status
    reason: str
    committed: int
    machine: str = field(repr=False)
    rows: tuple[Row, ...] = ()
    checkpoint: Checkpoint | None = None
    updates: tuple[KeptUpdate, ...] = ()
    cohorts: Mapping[OrderId, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class KeptRun:
    """A run as it was at the last moment that was kept."""

    record: RunRecord
    progress: Progress
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that an auditor would ask about: what, when, to what, and who did it."""

    at: float
    kind: str
    subject: str
    actor: str = ""
    detail: str = ""
