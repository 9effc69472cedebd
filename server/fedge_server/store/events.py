"""What auditors ask about: who did what, and when. The newest hundred thousand are kept."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from fedge_server.store import schema
from fedge_server.store.records import Event

KEPT_EVENTS: Final = 100_000
_PRUNE_EVERY: Final = 1000


def add_event(connection: sa.Connection, event: Event) -> None:
    """Keep an event, in the transaction of what it tells of."""
    table = schema.events
    values = {name: getattr(event, name) for name in Event.__dataclass_fields__}
    key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
    if key is not None and key[0] % _PRUNE_EVERY == 0:
        connection.execute(sa.delete(table).where(table.c.id <= key[0] - KEPT_EVENTS))


def newest_events(connection: sa.Connection, *, limit: int) -> tuple[Event, ...]:
    """The newest events, newest first."""
    table = schema.events
    found = connection.execute(sa.select(table).order_by(table.c.id.desc()).limit(limit))
    return tuple(Event(row.at, row.kind, row.subject, row.actor, row.detail) for row in found)
