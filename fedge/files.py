"""Small, careful file work that every shell needs: capped reads, private and atomic writes."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedge.errors import ConfigError, StorageError


def read_capped(path: Path, *, max_bytes: int) -> bytes:
    """The bytes of a regular file, refused by size before they are read.

    Raises:
        ConfigError: it is missing, not a file, unreadable or larger than `max_bytes`.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ConfigError(f"{path}: expected a file, found something else")
        if size > max_bytes:
            raise ConfigError(f"{path}: expected at most {max_bytes} bytes, found {size}")
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a file, found none") from None
    except ValueError as error:  # a name with a zero byte in it
        raise ConfigError(f"{str(path)!r}: expected the name of a file: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def write_private(path: Path, data: bytes | str) -> None:
    """Write a file that only its owner can read (0600), all or nothing, durable when it returns.

    Raises:
        StorageError: the folder is missing, read-only or full.
    """
    _write(path, data.encode() if isinstance(data, str) else data, mode=0o600)


def write_atomic(path: Path, data: bytes | str) -> None:
    """As `write_private`, with the permissions that the user's umask gives."""
    umask = os.umask(0)
    os.umask(umask)
    _write(path, data.encode() if isinstance(data, str) else data, mode=0o666 & ~umask)


def private_folder(path: Path) -> Path:
    """Make `path` (and its parents) a folder that only its owner can enter (0700), and return it."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise StorageError(f"{path}: cannot make a private folder there: {error.strerror}") from None
    return path


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Have a folder for this process alone, for as long as the block lasts or the process lives.

    Raises:
        StorageError: another process has it.
    """
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{folder}: expected a folder of this process alone, found another one at work in it: "
                "stop that one"
            ) from None
        yield
    finally:
        os.close(handle)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None
