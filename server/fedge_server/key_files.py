"""Reading keys and certificates from files: capped, and a private key only if it is its owner's alone."""

from __future__ import annotations

from pathlib import Path

from fedge.errors import IdentityError
from fedge.files import read_capped

_MAX_FILE_BYTES = 64 * 1024


def read_pem(path: Path) -> bytes:
    """The bytes of a PEM file.

    Raises:
        ConfigError: it is missing, unreadable or too large.
    """
    return read_capped(path, max_bytes=_MAX_FILE_BYTES)


def read_key(path: Path) -> bytes:
    """The bytes of a private key's PEM file.

    Raises:
        ConfigError: as for `read_pem`.
        IdentityError: others can read it.
    """
    data = read_pem(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise IdentityError(f"{path}: expected a file only its owner can read, found {mode:o}: chmod 600 it")
    return data
