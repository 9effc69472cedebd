"""Bytes of a local file, as many as were expected: nothing is allocated on a file's word alone."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

from fedge.errors import ConfigError

MAX_BYTES = 4 << 30
"""Of a file, unpacked: more is another kind of data set than these parsers are for."""


def file_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """All of a file, unpacked if its name ends with .gz.

    Raises:
        ConfigError: it cannot be read, is no gzip file, or has more than `max_bytes`.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or "a damaged or truncated gzip file"
        raise ConfigError(f"{path}: expected a file that can be read, found: {why}") from None
    if len(data) > max_bytes:
        raise ConfigError(f"{path}: expected at most {max_bytes} bytes, found more")
    return bytes(data)


def finite(value: object) -> float | None:
    """The finite number that a cell, or a value of JSON, says; None if it says none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def malformed(path: Path, expected: str, found: str) -> ConfigError:
    """The error that says so."""
    return ConfigError(f"{path}: expected {expected}, found {found}")
