"""Where a coordinator's records are: the folder and the database that its server.toml names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import IdentityError, StorageError
from fedge.faults import Faults
from fedge.files import private_folder
from fedge.signing import authority_of_pem
from fedge_server.identity import Authority
from fedge_server.key_files import read_pem
from fedge_server.settings import ServerSettings, load_server
from fedge_server.store.database import Database
from fedge_server.store.registry import Registry


def state_folder(settings: ServerSettings, folder: Path) -> Path:
    """The private folder of the database's file and the checkpoints; made if it is missing."""
    return private_folder(folder / settings.state)


def database_of(settings: ServerSettings, folder: Path, faults: Faults | None = None) -> Database:
    """The coordinator's database, not open yet; `folder` is the one of its server.toml.

    Raises:
        ConfigError: `database` is no URL of a database that this version knows.
        StorageError: its file cannot be made.
    """
    url = settings.database or _own_database(state_folder(settings, folder) / "fedge.db")
    return Database(url, faults)


def authority_of(settings: ServerSettings, folder: Path, database: Database) -> Authority:
    """The authority that a server.toml in `folder` names, with its records in a database that is open.

    Raises:
        ConfigError, IdentityError: its files are missing or damaged.
    """
    apart: ec.EllipticCurvePublicKey | None = None
    if settings.directory.authority:
        path = folder / settings.directory.authority
        try:
            apart = authority_of_pem(read_pem(path))
        except IdentityError as error:
            raise IdentityError(f"{path}: {error}") from None
    return Authority.load(folder / settings.identity, Registry(database), apart=apart)


@contextmanager
def authority_beside(server_toml: Path) -> Iterator[Authority]:
    """The authority of a coordinator that may be running, for one short change beside it.

    Raises:
        ConfigError, IdentityError: its files are missing or damaged.
        StorageError: its database cannot be reached.
    """
    settings, folder = load_server(server_toml), server_toml.parent
    database = database_of(settings, folder)
    try:
        database.join()
        yield authority_of(settings, folder, database)
    finally:
        database.close()


def _own_database(path: Path) -> str:
    """The URL of the SQLite database in a file that only its owner can read."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened: {error.strerror}") from None
    return f"sqlite:///{path.resolve()}"
