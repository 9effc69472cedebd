"""Authorities for tests: a CA's folder with its records in a SQLite file beside it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from fedge.errors import IdentityError
from fedge.principal import Principal
from fedge_server.identity import Authority, Credential
from fedge_server.store.database import Database
from fedge_server.store.registry import Registry


def new_authority(folder: Path, *, hosts: Iterable[str] = (), now: datetime) -> tuple[Authority, Credential]:
    """A new federation in `folder`, as `fedge server init` makes one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(f"sqlite:///{folder / 'fedge.db'}")
    database.open()
    return Authority.create(folder, Registry(database), hosts=hosts, now=now)


def load_authority(folder: Path) -> Authority:
    """The same authority as another process beside the coordinator's has it."""
    database = Database(f"sqlite:///{folder / 'fedge.db'}")
    database.join()
    return Authority.load(folder, Registry(database))


def is_refused(authority: Authority, principal: Principal, *, now: datetime) -> bool:
    """Whether a certificate does not count (any more)."""
    try:
        authority.check(principal, now=now)
    except IdentityError:
        return True
    return False
