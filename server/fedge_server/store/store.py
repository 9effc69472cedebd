"""The coordinator's records: one interface, one implementation in SQL for both databases.

Calls block until the database has answered: the event loop makes them on a thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fedge.errors import StorageError
from fedge.events import OrderId
from fedge.history import Row
from fedge.run_state import Status
from fedge_server.store import schema
from fedge_server.store.database import Database
from fedge_server.store.events import add_event, newest_events
from fedge_server.store.records import Checkpoint, Event, KeptRun, KeptUpdate, Progress, RunRecord


class Store:
    """Runs, rounds, cohorts, accepted updates, checkpoints and events.

    **Guarantees.** What a method has written when it returns is there after a crash; what it has not is as
    if it had never been called. An update is kept at most once for its order and client.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_run(self, record: RunRecord, progress: Progress) -> None:
        """Keep a new run and its first moment.

        Raises:
            StorageError: nothing was kept; trying again may help.
        """
        with self._database.writing() as connection:
            values = {name: getattr(record, name) for name in RunRecord.__dataclass_fields__}
            connection.execute(sa.insert(schema.runs).values(**values, **_standing(progress), ended_at=None))
            self._write(connection, progress)

    def save(self, progress: Progress, *, now: float, keep: int = 1) -> None:
        """Keep a moment of a run, whole; of its checkpoints, the newest `keep` stay.

        Raises:
            StorageError: nothing was kept; trying again may help.
        """
        with self._database.writing() as connection:
            ended_at = None if progress.status == "running" else now
            connection.execute(
                sa.update(schema.runs)
                .where(schema.runs.c.run_id == progress.run_id)
                .values(**_standing(progress), ended_at=ended_at)
            )
            self._write(connection, progress)
            if progress.checkpoint is not None:
                self._trim_checkpoints(connection, progress.run_id, keep)

    def runs(self) -> tuple[KeptRun, ...]:
        """Every run as it was last kept, oldest first; their rows are read with `rows`."""
        with self._database.reading() as connection:
            found = connection.execute(
                sa.select(schema.runs).order_by(schema.runs.c.submitted_at, schema.runs.c.run_id)
            )
            return tuple(self._kept_run(connection, row._mapping) for row in found.fetchall())

    def run(self, run_id: str) -> KeptRun:
        """One run, as `runs` gives it.

        Raises:
            StorageError: it is not known.
        """
        with self._database.reading() as connection:
            found = connection.execute(sa.select(schema.runs).where(schema.runs.c.run_id == run_id)).first()
            if found is None:
                raise StorageError(f"store: expected run {run_id!r}, found none")
            return self._kept_run(connection, found._mapping)

    def rows(self, run_id: str) -> tuple[Row, ...]:
        """A run's committed rounds, in order."""
        with self._database.reading() as connection:
            found = connection.execute(
                sa.select(schema.rounds)
                .where(schema.rounds.c.run_id == run_id)
                .order_by(schema.rounds.c.round)
            )
            return tuple(_row(row._mapping) for row in found)

    def digests(self, run_id: str) -> frozenset[str]:
        """Those of a run's checkpoints: a file of it that none of them names serves nobody."""
        table = schema.checkpoints
        with self._database.reading() as connection:
            found = connection.execute(sa.select(table.c.digest).where(table.c.run_id == run_id))
            return frozenset(row.digest for row in found)

    def forget_run(self, run_id: str) -> None:
        """Drop all that is known of a run.

        Raises:
            StorageError: it is all still there.
        """
        with self._database.writing() as connection:
            connection.execute(sa.delete(schema.runs).where(schema.runs.c.run_id == run_id))

    def record(self, event: Event) -> None:
        """Keep an event; the oldest go when there are more than a hundred thousand.

        Raises:
            StorageError: it was not kept.
        """
        with self._database.writing() as connection:
            add_event(connection, event)

    def events(self, *, limit: int = 1000) -> tuple[Event, ...]:
        """The newest events, newest first."""
        with self._database.reading() as connection:
            return newest_events(connection, limit=limit)

    def _write(self, connection: sa.Connection, progress: Progress) -> None:
        """Everything of a moment but the run's own row."""
        run_id = progress.run_id
        if progress.rows:
            table = schema.rounds
            changed = [row.round for row in progress.rows]
            connection.execute(sa.delete(table).where(table.c.run_id == run_id, table.c.round.in_(changed)))
            connection.execute(sa.insert(table), [_row_values(run_id, row) for row in progress.rows])
        if progress.checkpoint is not None:
            values = {"run_id": run_id, "round": progress.checkpoint.round}
            content = {"digest": progress.checkpoint.digest, "size": progress.checkpoint.size}
            connection.execute(
                self._upsert(schema.checkpoints, content, ["run_id", "round"]), {**values, **content}
            )
        open_orders = [_order_is(schema.updates, order) for order in progress.cohorts]
        connection.execute(
            sa.delete(schema.updates).where(
                schema.updates.c.run_id == run_id, sa.not_(sa.or_(sa.false(), *open_orders))
            )
        )
        if progress.updates:
            connection.execute(
                self._insert(schema.updates).on_conflict_do_nothing(),
                [_update_values(run_id, update) for update in progress.updates],
            )
        connection.execute(sa.delete(schema.members).where(schema.members.c.run_id == run_id))
        members = [
            {"run_id": run_id, **_order_values(order), "client": client, "state": state}
            for order, cohort in progress.cohorts.items()
            for client, state in cohort.items()
        ]
        if members:
            connection.execute(sa.insert(schema.members), members)

    def _trim_checkpoints(self, connection: sa.Connection, run_id: str, keep: int) -> None:
        table = schema.checkpoints
        newest = sa.select(table.c.round).where(table.c.run_id == run_id).order_by(table.c.round.desc())
        kept = [row.round for row in connection.execute(newest.limit(keep))]
        connection.execute(sa.delete(table).where(table.c.run_id == run_id, table.c.round.not_in(kept)))

    def _kept_run(self, connection: sa.Connection, row: sa.RowMapping) -> KeptRun:
        run_id = row["run_id"]
        table = schema.checkpoints
        checkpoint = connection.execute(
            sa.select(table).where(table.c.run_id == run_id).order_by(table.c.round.desc()).limit(1)
        ).first()
        updates = connection.execute(
            sa.select(schema.updates)
            .where(schema.updates.c.run_id == run_id)
            .order_by(schema.updates.c.client)
        )
        members = connection.execute(sa.select(schema.members).where(schema.members.c.run_id == run_id))
        cohorts: dict[OrderId, dict[str, str]] = {}
        for member in members:
            cohorts.setdefault(_order(member._mapping), {})[member.client] = member.state
        progress = Progress(
            run_id,
            cast("Status", row["status"]),
            row["reason"],
            row["committed"],
            row["machine"],
            checkpoint=Checkpoint(checkpoint.round, checkpoint.digest, checkpoint.size)
            if checkpoint
            else None,
            updates=tuple(_update(update._mapping) for update in updates),
            cohorts=cohorts,
        )
        record = RunRecord(**{name: row[name] for name in RunRecord.__dataclass_fields__})
        return KeptRun(record, progress, row["ended_at"])

    def _insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An insert that can say what to do about a conflict: both dialects can, in the same words."""
        if self._database.dialect == "sqlite":
            return sqlite.insert(table)
        return postgresql.insert(table)

    def _upsert(self, table: sa.Table, content: Mapping[str, object], key: Sequence[str]) -> sa.Insert:
        return self._insert(table).on_conflict_do_update(index_elements=list(key), set_=dict(content))


def _standing(progress: Progress) -> dict[str, object]:
    """A moment as the run's own row has it."""
    return {name: getattr(progress, name) for name in ("status", "reason", "committed", "machine")}


def _order_values(order: OrderId) -> dict[str, object]:
    return {"kind": order.kind, "round": order.round, "attempt": order.attempt}


def _order_is(table: sa.Table, order: OrderId) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.kind == order.kind, table.c.round == order.round, table.c.attempt == order.attempt)


def _order(row: sa.RowMapping) -> OrderId:
    return OrderId(row["kind"], row["round"], row["attempt"])


def _row_values(run_id: str, row: Row) -> dict[str, object]:
    values = {name: getattr(row, name) for name in Row.__dataclass_fields__}
    return {
        **values,
        "run_id": run_id,
        "clients": json.dumps(row.clients),
        "metrics": json.dumps(dict(row.metrics)),
    }


def _row(values: sa.RowMapping) -> Row:
    fields = {name: values[name] for name in Row.__dataclass_fields__}
    clients, metrics = tuple(json.loads(values["clients"])), json.loads(values["metrics"])
    return Row(**{**fields, "clients": clients, "metrics": metrics})


def _update_values(run_id: str, update: KeptUpdate) -> dict[str, object]:
    return {
        "run_id": run_id,
        **_order_values(update.order),
        "client": update.client,
        "num_examples": update.num_examples,
        "metrics": json.dumps(dict(update.metrics)),
        "staleness": update.staleness,
        "size": update.size,
        "digest": update.digest,
        "place": update.place,
        "inline": update.inline,
    }


def _update(row: sa.RowMapping) -> KeptUpdate:
    return KeptUpdate(
        _order(row),
        row["client"],
        row["num_examples"],
        row["size"],
        bytes(row["digest"]),
        json.loads(row["metrics"]),
        row["staleness"],
        row["place"],
        bytes(row["inline"]) if row["inline"] is not None else None,
    )
