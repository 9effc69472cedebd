"""One suite for both databases: what the store has written is there, whole, once, and after the process is gone."""

from __future__ import annotations

import math
import multiprocessing
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from databases import database_url, postgresql

from fedge.errors import ConfigError, StorageError
from fedge.events import OrderId
from fedge.history import Row
from fedge_server.store import events, schema
from fedge_server.store.database import Database
from fedge_server.store.records import Checkpoint, Event, KeptUpdate, Progress, RunRecord
from fedge_server.store.store import Store

__all__ = ["database_url", "postgresql"]  # fixtures that the tests here ask for

TRAIN = OrderId("train", 3, 2)
EVALUATE = OrderId("evaluate", 2)
RECORD = RunRecord("icu-1", "icu", 'name = "icu"\n', b"\x00\xff", "FedAvg()", 12.5, "admin")
FIRST = Progress("icu-1", "running", "", 0, "{}", checkpoint=Checkpoint(0, "aa", 10))
ROW = Row(1, 2, ("a", "b"), 2**40, 0.25, 2**41, 7, 1, 3, {"loss": 0.1, "nan": math.nan})
UPDATE = KeptUpdate(TRAIN, "a", 5, 40, b"\x01" * 32, {"loss": 1.5}, 0, "slot-1")
SMALL = KeptUpdate(TRAIN, "b", 6, 4, b"\x02" * 32, {}, 1, "", b"\x00\x00\x80\x3f")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def begun(store: Store) -> Store:
    store.add_run(RECORD, FIRST)
    return store


def test_a_run_is_kept_as_it_was_submitted(begun: Store) -> None:
    (kept,) = begun.runs()
    assert (kept.record, kept.progress, kept.ended_at) == (RECORD, FIRST, None)


def test_a_moment_is_kept_whole(begun: Store) -> None:
    moment = replace(
        FIRST,
        committed=2,
        machine='{"round":2}',
        checkpoint=Checkpoint(2, "bb", 20),
        updates=(UPDATE, SMALL),
        cohorts={TRAIN: {"a": "accepted", "b": "accepted", "c": "pending"}, EVALUATE: {"c": "lost"}},
    )
    begun.save(moment, now=13.0)
    assert begun.runs()[0].progress == moment


def test_rows_come_back_in_order_and_a_changed_one_takes_its_place(begun: Store) -> None:
    second = replace(ROW, round=2, metrics={})
    begun.save(replace(FIRST, rows=(second,)), now=1.0)
    begun.save(replace(FIRST, rows=(ROW, replace(second, metrics={"accuracy": 0.5}))), now=2.0)
    first, changed = begun.rows("icu-1")
    assert math.isnan(first.metrics["nan"])
    assert replace(first, metrics={}) == replace(ROW, metrics={})
    assert changed == replace(second, metrics={"accuracy": 0.5})


def test_an_update_is_kept_once_for_its_order_and_client(begun: Store) -> None:
    moment = replace(FIRST, cohorts={TRAIN: {"a": "accepted"}})
    begun.save(replace(moment, updates=(UPDATE,)), now=1.0)
    begun.save(replace(moment, updates=(replace(UPDATE, num_examples=99), SMALL, SMALL)), now=2.0)
    assert begun.runs()[0].progress.updates == (UPDATE, SMALL)


def test_updates_of_orders_that_are_over_are_forgotten(begun: Store) -> None:
    judged = replace(UPDATE, order=EVALUATE)
    begun.save(
        replace(FIRST, updates=(UPDATE, judged), cohorts={TRAIN: {}, EVALUATE: {"a": "accepted"}}), now=1.0
    )
    begun.save(replace(FIRST, cohorts={EVALUATE: {"a": "accepted"}}), now=2.0)
    assert begun.runs()[0].progress.updates == (judged,)
    begun.save(FIRST, now=3.0)
    assert begun.runs()[0].progress.updates == ()


def test_the_newest_checkpoints_stay_and_older_ones_are_let_go(begun: Store) -> None:
    for round in (1, 2, 3):
        begun.save(replace(FIRST, checkpoint=Checkpoint(round, f"c{round}", round)), now=1.0, keep=2)
    begun.save(replace(FIRST, checkpoint=Checkpoint(3, "again", 4)), now=1.0, keep=2)
    begun.save(replace(FIRST, checkpoint=None), now=1.0)
    assert begun.runs()[0].progress.checkpoint == Checkpoint(3, "again", 4)
    assert begun.digests("icu-1") == {"c2", "again"}
    assert begun.digests("another") == frozenset()


def test_the_end_of_a_run_is_dated(begun: Store) -> None:
    begun.save(replace(FIRST, status="failed", reason="nobody came"), now=77.0)
    (kept,) = begun.runs()
    assert (kept.progress.status, kept.progress.reason, kept.ended_at) == ("failed", "nobody came", 77.0)


def test_runs_come_oldest_first_and_leave_nothing_behind(begun: Store, database: Database) -> None:
    begun.add_run(replace(RECORD, run_id="older", submitted_at=1.0), replace(FIRST, run_id="older"))
    assert [kept.record.run_id for kept in begun.runs()] == ["older", "icu-1"]
    full = replace(FIRST, rows=(ROW,), updates=(UPDATE,), cohorts={TRAIN: {"a": "accepted"}})
    begun.save(full, now=1.0)
    begun.forget_run("icu-1")
    begun.forget_run("older")
    with database.reading() as connection:
        for table in schema.metadata.sorted_tables:
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 0, table.name


def test_a_moment_that_fails_half_way_is_not_kept_at_all(begun: Store) -> None:
    before = begun.runs()
    broken = replace(FIRST, committed=1, rows=(ROW, ROW))  # the same round twice: the database objects
    with pytest.raises(sa.exc.IntegrityError):
        begun.save(broken, now=1.0)
    assert begun.runs() == before
    begun.save(replace(broken, rows=(ROW,)), now=1.0)
    assert begun.runs()[0].progress.committed == 1


def test_events_are_listed_newest_first(store: Store) -> None:
    events = [Event(float(at), "site_revoked", f"site-{at}", "admin", "lost") for at in range(5)]
    for event in events:
        store.record(event)
    assert store.events(limit=3) == tuple(reversed(events[2:]))


def test_the_oldest_events_make_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEPT_EVENTS", 10)
    monkeypatch.setattr(events, "_PRUNE_EVERY", 5)
    for at in range(32):
        store.record(Event(float(at), "k", "s"))
    assert [event.at for event in store.events()] == [float(at) for at in range(31, 19, -1)]


def test_what_was_kept_is_there_when_the_database_is_opened_again(database_url: str) -> None:
    first = Database(database_url)
    first.open()
    Store(first).add_run(RECORD, FIRST)
    first.close()
    second = Database(database_url)
    second.open()
    assert Store(second).runs()[0].record == RECORD
    second.close()


def _write_and_die(url: str, rounds: int) -> None:
    database = Database(url)
    database.open()
    store = Store(database)
    store.add_run(RECORD, FIRST)
    for round in range(1, rounds + 1):
        store.save(replace(FIRST, committed=round, rows=(replace(ROW, round=round),)), now=1.0)
    with database.writing() as connection:
        connection.execute(sa.update(schema.runs).values(committed=999))
        os._exit(9)


def test_a_process_that_dies_in_a_transaction_leaves_what_it_had_committed(database_url: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(database_url, 3))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    database = Database(database_url)
    database.open()
    store = Store(database)
    assert store.runs()[0].progress.committed == 3
    assert [row.round for row in store.rows("icu-1")] == [1, 2, 3]
    store.save(replace(FIRST, committed=4), now=1.0)
    database.close()


def test_the_migrations_make_exactly_the_tables_that_the_code_uses(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_a_database_of_a_newer_version_is_refused(database_url: str) -> None:
    first = Database(database_url)
    first.open()
    with first.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    first.close()
    with pytest.raises(ConfigError, match="this version of fedge or an older one"):
        Database(database_url).open()


def test_one_coordinator_at_a_time_writes_to_a_postgresql_database(postgresql: sa.URL) -> None:
    url = postgresql.render_as_string(hide_password=False)
    first, second = Database(url), Database(url)
    first.open()
    with pytest.raises(StorageError, match="another one at work on it"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_lost_connection_is_an_error_once_and_then_a_new_one(postgresql: sa.URL) -> None:
    database = Database(postgresql.render_as_string(hide_password=False))
    database.open()
    with database.reading() as other:
        other.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    store = Store(database)
    with pytest.raises(StorageError, match="cannot be used now"):
        store.record(Event(1.0, "k", "s"))
    store.record(Event(2.0, "k", "s"))
    assert [event.at for event in store.events(limit=1)] == [2.0]
    database.close()


def test_a_full_disk_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "fedge.db"
    database = Database(f"sqlite:///{path}")
    database.open()
    store = Store(database)
    store.add_run(RECORD, FIRST)
    with database.writing() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        limited = connection.connection.dbapi_connection
    big = replace(FIRST, machine="x" * 10_000_000)
    with pytest.raises(StorageError, match="full"):
        store.save(big, now=1.0)
    assert isinstance(limited, sqlite3.Connection)  # it was the connection that writes
    assert store.runs()[0].progress == FIRST
    store.save(big, now=1.0)  # on a new connection, without the limit: there is room again
    assert store.runs()[0].progress == big
    database.close()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("not a url", "expected a URL"),
        ("mysql://host/db", "expected sqlite or postgresql, found 'mysql'"),
        ("postgresql+asyncpg://host/db", "found 'postgresql.asyncpg'"),
    ],
)
def test_the_url_of_another_kind_of_database_is_refused(url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Database(url)


def test_a_server_that_is_not_there_is_an_error_without_the_password(tmp_path: Path) -> None:
    database = Database(f"postgresql://me:secret@/x?host={tmp_path}")
    with pytest.raises(StorageError, match="cannot be used now") as caught:
        database.open()
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open database file"):
        Database(f"sqlite:///{tmp_path / 'absent' / 'fedge.db'}").open()
