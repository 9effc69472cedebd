"""The directory of the sites' keys in a file, on its way between the coordinator and the machine that signs it.

Canonical JSON: one text for each directory. What is signed is not this text but the layout in fedge/secagg, so a
file that says the same in other words would pass as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from fedge.config import Config, build
from fedge.errors import ConfigError
from fedge.files import read_capped, write_private
from fedge.principal import check_name
from fedge.secagg.directory import KEY_BYTES, MAX_STATEMENTS, Directory, Statement
from fedge.signing import MAX_SIGNATURE_BYTES, SignedDirectory

_MAX_BYTES: Final = 64 << 20
_MAX_NUMBER: Final = 2**53 - 1
_FORMAT: Final = "fedge directory 1"


def _site(name: str) -> str:
    try:
        return check_name(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None


_Number = Annotated[int, Field(ge=0, le=_MAX_NUMBER)]


class _Statement(Config):
    site: Annotated[str, AfterValidator(_site)]
    key: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]
    not_before: _Number
    not_after: _Number


class _File(Config):
    format: Literal["fedge directory 1"]
    federation: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    epoch: Annotated[int, Field(ge=1, le=_MAX_NUMBER)]
    statements: Annotated[list[_Statement], Field(max_length=MAX_STATEMENTS)]
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=2 * MAX_SIGNATURE_BYTES)] = ""


def write_directory(path: Path, directory: Directory, signature: bytes = b"") -> None:
    """Write a directory, signed or not, all or nothing.

    Raises:
        StorageError: the file cannot be written.
    """
    table: dict[str, Any] = {
        "format": _FORMAT,
        "federation": directory.federation,
        "epoch": directory.epoch,
        "statements": [
            {
                "site": each.site,
                "key": each.key.hex(),
                "not_before": each.not_before,
                "not_after": each.not_after,
            }
            for each in directory.statements
        ],
    }
    if signature:
        table["signature"] = signature.hex()
    write_private(path, json.dumps(table, sort_keys=True, separators=(",", ":")) + "\n")


def read_unsigned(path: Path) -> Directory:
    """The directory in a file that `fedge server directory export` has written.

    Raises:
        ConfigError: it is missing, damaged, or signed already.
    """
    found = _read(path)
    if found.signature:
        raise ConfigError(f"{path}: expected a directory that is not signed yet, found a signed one")
    return found.directory


def read_signed(path: Path) -> SignedDirectory:
    """The directory in a file that `fedge server directory sign` has written; its signature is not checked.

    Raises:
        ConfigError: it is missing, damaged, or not signed.
    """
    found = _read(path)
    if not found.signature:
        raise ConfigError(
            f"{path}: expected a signed directory, found one without a signature: `fedge server directory sign` it"
        )
    return found


def _read(path: Path) -> SignedDirectory:
    data = read_capped(path, max_bytes=_MAX_BYTES)
    try:
        table = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # what is not UTF-8 is a ValueError, too
        raise ConfigError(
            f"{path}: expected a directory as JSON, found something else, or a part of one: {str(error)[:200]}"
        ) from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: expected a directory as JSON, found something else")
    file = build(_File, table, source=str(path))
    statements = [
        Statement(each.site, bytes.fromhex(each.key), each.not_before, each.not_after)
        for each in file.statements
    ]
    directory = Directory.of(file.federation, file.epoch, statements)
    if len({each.site for each in statements}) != len(statements):
        raise ConfigError(f"{path}: expected each site once, found one twice")
    return SignedDirectory(directory, bytes.fromhex(file.signature))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is there twice, readers differ on which one counts."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table
