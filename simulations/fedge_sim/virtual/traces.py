"""Files of devices, and of when clients are there: CSV with a header, or JSON.

Strict: what is not understood is refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from fedge.errors import ConfigError
from fedge.files import read_capped
from fedge_sim.data.reading import finite

MAX_BYTES: Final = 1 << 28
MAX_ROWS: Final = 10_000_000

Row = Mapping[str, float]
Interval = tuple[float, float]

_DEVICE = frozenset(
    ("compute", "down_mbps", "up_mbps", "latency_ms", "memory_mb", "compute_watts", "radio_watts", "dropout")
)


def read_devices(path: Path) -> Sequence[Row]:
    """Devices, a row each: some of `[simulation.devices]`' keys.

    Raises:
        ConfigError: it cannot be read, has other columns, or numbers that no device can have.
    """
    rows = _table(path, "devices")
    for number, row in enumerate(rows, start=1):
        where = f"{path}: device {number}"
        if odd := sorted(set(row) - _DEVICE):
            raise ConfigError(
                f"{where}: expected some of {', '.join(sorted(_DEVICE))}, found {', '.join(odd)[:200]}"
            )
        for name, value in row.items():
            good = 0 <= value <= 1 if name == "dropout" else 0 < value <= 1e15
            if not good:
                expected = (
                    "a chance from 0 to 1" if name == "dropout" else "a number above 0, of at most 1e15"
                )
                raise ConfigError(f"{where}: {name}: expected {expected}, found {value:g}")
    return rows


def read_availability(path: Path, *, clients: int, period_s: float | None) -> list[list[Interval]]:
    """When each client is there: rows of `client` (its index), `from_s` and `to_s`; its intervals in order.

    Raises:
        ConfigError: it cannot be read, or is no such table; an interval is empty, overlaps another of its client or
            goes beyond the period; or a client, of those that there are, has none.
    """
    found: list[list[Interval]] = [[] for _ in range(clients)]
    for number, row in enumerate(_table(path, "intervals"), start=1):
        where = f"{path}: interval {number}"
        if set(row) != {"client", "from_s", "to_s"}:
            raise ConfigError(
                f"{where}: expected client, from_s and to_s, found {', '.join(sorted(row))[:200]}"
            )
        client, start, end = row["client"], row["from_s"], row["to_s"]
        if not (client.is_integer() and 0 <= client < clients):
            raise ConfigError(f"{where}: client: expected an index from 0 to {clients - 1}, found {client:g}")
        if not 0 <= start < end:
            raise ConfigError(f"{where}: expected 0 <= from_s < to_s, found {start:g} and {end:g}")
        if period_s is not None and end > period_s:
            raise ConfigError(f"{where}: to_s: expected at most the period of {period_s:g} s, found {end:g}")
        found[int(client)].append((start, end))
    for index, intervals in enumerate(found):
        if not intervals:
            raise ConfigError(
                f"{path}: expected intervals of {clients} clients, found none of client {index}: the trace has a hole "
                "there; add them, or lower [simulation] clients"
            )
        intervals.sort()
        for (_, end), (start, _) in pairwise(intervals):
            if start < end:
                raise ConfigError(
                    f"{path}: client {index}: expected intervals that do not overlap, found one from {start:g} s "
                    f"before the one until {end:g} s is over"
                )
    return found


def _table(path: Path, what: str) -> list[dict[str, float]]:
    """Rows of numbers by their columns' names."""
    text = read_capped(path, max_bytes=MAX_BYTES)
    try:
        rows = _of_json(text) if path.suffix == ".json" else _of_csv(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise ConfigError(
            f"{path}: expected {what} as CSV, or as JSON in a file that ends so: {str(error)[:200]}"
        ) from None
    if not rows:
        raise ConfigError(f"{path}: expected {what}, a row each, found none")
    return rows


def _of_csv(text: bytes) -> list[dict[str, float]]:
    lines = csv.reader(io.StringIO(text.decode("utf-8-sig")), strict=True)
    header = [name.strip() for name in next(lines, [])]
    if len(set(header)) < len(header) or "" in header:
        raise ConfigError(f"expected a header of different names, found {', '.join(header)[:200]}")
    rows: list[dict[str, float]] = []
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise ConfigError(f"line {number}: expected {len(header)} cells, found {len(cells)}")
        rows.append(_numbers(dict(zip(header, cells, strict=True)), f"line {number}", len(rows)))
    return rows


def _of_json(text: bytes) -> list[dict[str, float]]:
    parsed = json.loads(text)
    if not isinstance(parsed, list) or not all(isinstance(each, dict) for each in parsed):
        raise ConfigError("expected a list of objects")
    return [_numbers(each, f"object {number}", number) for number, each in enumerate(parsed)]


def _numbers(row: Mapping[str, Any], where: str, before: int) -> dict[str, float]:
    if before >= MAX_ROWS:
        raise ConfigError(f"{where}: expected at most {MAX_ROWS} rows, found more")
    numbers = {}
    for name, value in row.items():
        number = finite(value)
        if number is None:
            raise ConfigError(
                f"{where}: {str(name)[:80]}: expected a finite number, found {str(value)[:80]!r}"
            )
        numbers[str(name)] = number
    return numbers


def beside(folder: Path | None, name: str) -> Path:
    """A file that a run names: beside the run's own, or where Python is at work, where that has none."""
    return (folder or Path()) / name


def chosen_row(rows: Sequence[Row], index: int, count: int, drawn: int) -> Row:
    """The row of a client: its own where there are as many as clients, else one that is drawn."""
    return rows[index] if len(rows) == count else rows[drawn % len(rows)]
