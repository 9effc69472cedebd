"""One database: SQLite in a file, or PostgreSQL by URL. Its connection, its schema, its single writer.

The connection that writes is also the one that holds the claim: a coordinator that has lost it cannot
write, and a second coordinator on the same database is refused while the first one lives.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command, util
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, exc

from fedge.errors import ConfigError, StorageError
from fedge.faults import Faults

_BUSY_S: Final = 10
_STATEMENT_S: Final = 60
_CLAIM: Final = 0x66656467  # the numbers of PostgreSQL's advisory locks: "fedg", and the one after it
_TURN: Final = _CLAIM + 1
_DEFECTS: Final = (exc.IntegrityError, exc.ProgrammingError, exc.DataError, exc.NotSupportedError)
_MIGRATIONS: Final = Path(__file__).parent / "migrations"


class Database:
    """Connections to one database. Safe to use from several threads; writing is one at a time."""

    def __init__(self, url: str, faults: Faults | None = None) -> None:
        """Take a URL, without connecting.

        Raises:
            ConfigError: it is not the URL of a database that this version knows.
        """
        self._engine = _engine(url)
        self._faults = faults or Faults()
        self.dialect: Final = self._engine.dialect.name
        self._where = self._engine.url.render_as_string(hide_password=True)
        self._writer: sa.Connection | None = None
        self._turn = threading.RLock()
        self._beside = False

    def open(self) -> None:
        """Claim the database and bring its schema up to date.

        Raises:
            StorageError: it cannot be reached or written, or another coordinator has it.
            ConfigError: it was written by a newer version of fedge.
        """
        with self._turn, self._errors():
            connection = self._claimed()
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except util.CommandError as error:
                raise ConfigError(
                    f"{self._where}: expected a database of this version of fedge or an older one, "
                    f"found one that it cannot bring up to date: {error}"
                ) from None

    def join(self) -> None:
        """Use the database of a coordinator that may be running, without the claim: for one short change.

        Raises:
            StorageError: it cannot be reached.
            ConfigError: its schema is not this version's.
        """
        self._beside = True
        script = ScriptDirectory(str(_MIGRATIONS))
        with self._errors(), self._engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found != script.get_current_head():
            raise ConfigError(
                f"{self._where}: expected a database that a coordinator of this version has used, found "
                f"schema {found or 'none'}: start the coordinator once, or see `fedge server init`"
            )

    def exclude(self, connection: sa.Connection) -> None:
        """Let no other process come as far as this in a transaction until this one is over.

        SQLite lets one process write at a time in any case.
        """
        if self.dialect == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_TURN)))

    def close(self) -> None:
        """Give the claim back."""
        with self._turn:
            self._drop_writer()
            self._engine.dispose()

    @contextmanager
    def writing(self, what: str = "store") -> Iterator[sa.Connection]:
        """A transaction: durable when the block is left, or, if it raises, as if it had not begun.

        `what` names its fault points.

        Raises:
            StorageError: the database cannot be reached or written now; trying again may help.
        """
        with self._turn, self._errors():
            self._faults.reach(f"{what}.before")
            connection = self._claimed()
            try:
                with connection.begin():
                    yield connection
                    self._faults.reach(f"{what}.commit")
                self._faults.reach(f"{what}.after")
            except exc.DBAPIError:
                self._drop_writer()  # whatever state it is in: the next one is new
                raise

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A look at what is committed.

        Raises:
            StorageError: the database cannot be reached.
        """
        with self._errors(), self._engine.connect() as connection:
            yield connection

    def _claimed(self) -> sa.Connection:
        """The connection that writes, which nobody else has."""
        if self._writer is None:
            connection = self._engine.connect()
            if self.dialect == "postgresql" and not self._beside:
                taken = connection.execute(sa.select(sa.func.pg_try_advisory_lock(_CLAIM))).scalar()
                connection.commit()
                if not taken:
                    connection.close()
                    raise StorageError(
                        f"{self._where}: expected a database of this coordinator alone, found another one "
                        "at work on it: stop that one, or give each its own database"
                    )
            connection.info["writes"] = True
            self._writer = connection
        return self._writer

    def _drop_writer(self) -> None:
        if self._writer is not None:
            with suppress(exc.SQLAlchemyError):
                self._writer.invalidate()  # closed, and not given to anybody: its claim ends with it
                self._writer.close()
            self._writer = None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (exc.DBAPIError, exc.TimeoutError) as error:
            if isinstance(error, _DEFECTS):
                raise
            words = " ".join(str(getattr(error, "orig", None) or error).split())
            raise StorageError(f"{self._where}: cannot be used now: {words}") from error
        except OSError as error:
            raise StorageError(f"{self._where}: cannot be used now: {error.strerror}") from error


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        raise ConfigError("database: expected a URL such as postgresql://user@host/name") from None
    if parsed.drivername == "sqlite":
        engine = sa.create_engine(parsed, connect_args={"timeout": _BUSY_S})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if parsed.drivername in ("postgresql", "postgres"):
        arguments = {
            "connect_timeout": 10,
            "tcp_user_timeout": 30_000,
            "options": f"-c statement_timeout={_STATEMENT_S}s -c synchronous_commit=on",
        }
        try:
            return sa.create_engine(
                parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, connect_args=arguments
            )
        except ImportError:
            raise ConfigError(
                "database: PostgreSQL needs a driver that is not installed: pip install 'fedge[postgres]'"
            ) from None
    raise ConfigError(f"database: expected sqlite or postgresql, found {parsed.drivername!r}")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    assert isinstance(connection, sqlite3.Connection)  # the only driver of that dialect here
    connection.isolation_level = None  # Python's own idea of transactions stays out of the way
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that means to write says so at once: it then waits its turn instead of failing late.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.info.get("writes") else "BEGIN")
