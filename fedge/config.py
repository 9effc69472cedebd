"""Strict TOML: frozen pydantic models, and errors that name the file, the key and the nearest valid key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from fedge.errors import ConfigError
from fedge.files import read_capped

MAX_CONFIG_BYTES = 1 << 20

_LONG_NUMBER: Final = re.compile(r"\d{20,}")
"""A bound such as 1e30, which pydantic writes out."""


class Config(BaseModel):
    """The base of every configuration value: frozen, strict about types, no unknown keys."""

    # Built when first used: an agent on a device never reads a run.toml, whose models are two megabytes.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


C = TypeVar("C", bound=Config)


def read_toml(path: Path) -> str:
    """The text of a TOML file of at most 1 MiB.

    Raises:
        ConfigError: it is missing, unreadable, too large or not UTF-8.
    """
    try:
        return read_capped(path, max_bytes=MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error}") from None


def parse_toml(text: str, kind: type[C], *, source: str) -> C:
    """A configuration from TOML text. `source` (a file's path) begins every error message.

    Raises:
        ConfigError: the text is not TOML, or a key is unknown, missing or ill-typed.
    """
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # most are TOMLDecodeError; a number of 5000 digits is a plain one
        raise ConfigError(f"{source}: not valid TOML: {str(error)[:200]}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid TOML: nested too deeply") from None
    return build(kind, table, source=source)


def build(kind: type[C], table: dict[str, Any], *, source: str) -> C:
    """A configuration from a parsed table; every problem found is one line of the ConfigError."""
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        lines = [_explain(kind, dict(problem)) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that points at the valid key nearest to `name`, or lists them all."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid keys: {', '.join(names)}" if names else "no keys are valid here"


def shown(value: object) -> str:
    """At most 80 characters of a value that was found where another was expected."""
    try:
        return repr(value)[:80]
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return "a number of thousands of digits"


def _explain(kind: type[BaseModel], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(location[-1], _keys(kind, location[:-1]))}"
    if problem["type"] == "missing":
        return f"expected a key {key!r}, found none"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if key else message
    message = _LONG_NUMBER.sub(lambda number: f"{float(number[0]):g}", problem["msg"])
    return f"{key}: {message[0].lower()}{message[1:]}, found {shown(problem['input'])}"


def _keys(kind: type[BaseModel], location: list[str]) -> list[str]:
    """The valid keys of the (possibly nested) table at `location`."""
    for part in location:
        field = kind.model_fields.get(part)
        inner = _table_of(field.annotation) if field else None
        if inner is None:
            return []
        kind = inner
    return list(kind.model_fields)


def _table_of(annotation: object) -> type[BaseModel] | None:
    """The table that a key is, be it one that may be left out."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _table_of(each))), None)
