"""Folders of results."""

from __future__ import annotations

from pathlib import Path

from fedge.errors import ConfigError


def prepare_folder(folder: Path) -> Path:
    """Make the folder before hours of work depend on it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: expected a folder that can be made, found {folder}: {error.strerror}"
        ) from None
    return folder
