"""What was measured, for people: a table in the terminal, and ratios alone in README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- ratios: written by `python -m benchmarks --readme` -->", "<!-- end of ratios -->"

_COLUMNS = "| workload | fedge / | ratio: median (min to max) | goal | stands at |"


def show(name: str, case: dict[str, Any], console: Console) -> None:
    """One case: every value of every side, the ratios, the goals."""
    table = Table(title=f"{name}: {case['title']}", title_justify="left")
    for heading in ("side", "value", "median", "min", "max"):
        table.add_column(heading, justify="left" if heading in ("side", "value") else "right")
    for side, found in case["sides"].items():
        for value, spread in found["values"].items():
            unit = value.rpartition("_")[2]
            table.add_row(side, value, *(_quantity(spread[key], unit) for key in ("median", "min", "max")))
        if "crash" in found:
            table.add_row(side, "[red]crashed[/]", "", "", "")
    for ratio, spread in case["ratios"].items():
        table.add_row(ratio, "ratio", *(f"{spread[key]:.3g}x" for key in ("median", "min", "max")))
    console.print(table)
    for goal in case["goals"]:
        limit = _quantity(goal["limit"], goal["unit"])
        mark = {True: "[green]pass[/]", False: "[red]fail[/]", None: "[yellow]not measured[/]"}[goal["met"]]
        value = _quantity(goal["value"]["median"], goal["unit"]) if goal["value"] else "-"
        console.print(f"  {mark}  {goal['text']}: {value}, goal at most {limit}", highlight=False)
    for side, found in case["sides"].items():
        if "crash" in found:
            console.print(f"  [red]{side} crashed[/]", highlight=False)
            console.print(found["crash"], highlight=False, markup=False)
    if case["load_before"] > 1:
        load = f"{case['load_before']:.1f}"
        console.print(f"  [yellow]the machine was busy before: load {load}[/]", highlight=False)


def rewrite_readme(readme: Path, results: Path) -> None:
    """Put the ratios of `results` between the markers of `readme`, in place of those of the same cases.

    Raises:
        ValueError: there are no results, or the markers are not there.
    """
    head, table, tail = between(readme, BEGIN, END)
    measured = {name: _Shown.of(name, case) for name, case in cases_in(results).items()}
    cases = _shown_already(table) | measured
    rows = [row for case in cases.values() for row in case.rows]
    lines = [BEGIN, "", _COLUMNS, "|---|---|---|---|---|", *rows, "", *(case.note for case in cases.values())]
    readme.write_text("\n".join([head + lines[0], *lines[1:], "", END]) + tail)


def cases_in(results: Path) -> dict[str, Any]:
    """What was measured, by the names of the cases.

    Raises:
        ValueError: there are no results.
    """
    if not results.exists():
        raise ValueError(f"{results}: expected results, found none; run `python -m benchmarks` first")
    found: dict[str, Any] = json.loads(results.read_text())["cases"]
    return found


def between(page: Path, begin: str, end: str) -> tuple[str, str, str]:
    """A page's text before, between and behind two lines of it.

    Raises:
        ValueError: they are not there.
    """
    head, begins, rest = page.read_text().partition(begin)
    table, ends, tail = rest.partition(end)
    if not begins or not ends:
        raise ValueError(f"{page}: expected the lines {begin!r} and {end!r}")
    return head, table, tail


@dataclass(frozen=True)
class _Shown:
    """A case in the README: a row a ratio and a row a goal, and when and where it was measured."""

    rows: tuple[str, ...]
    note: str

    @classmethod
    def of(cls, name: str, case: dict[str, Any]) -> _Shown:
        """Ratios and shares of the goal only: times are the machine's."""
        rows = []
        for ratio, spread in case["ratios"].items():
            other = ratio.partition("/")[2]
            shown = f"{spread['median']:.3g} ({spread['min']:.3g} to {spread['max']:.3g})"
            rows.append(("", other, shown, "", ""))
        for goal in case["goals"]:
            limit = f"{goal['text']}: at most {_quantity(goal['limit'], goal['unit'])}"
            rows.append(("", "", "", limit, _standing(goal)))
        rows = [(f"{name}, {case['title']}" if row is rows[0] else "", *row[1:]) for row in rows]
        of = "a --quick run" if case["quick"] else f"{case['repeat']} repetitions"
        load = case["load_before"]
        busy = f", on a machine busy with other work ({load:.1f})" if load > 1 else ""
        note = f"* {name}: {of}, {case['date']}, {case['machine']}{busy}."
        return cls(tuple(f"| {' | '.join(row)} |" for row in rows), note)


def _shown_already(table: str) -> dict[str, _Shown]:
    """The cases of a table that was written before, perhaps on a machine that is gone."""
    rows: dict[str, list[str]] = {}
    name = ""
    for line in table.splitlines():
        if line.startswith("| ") and line != _COLUMNS:
            name = line.removeprefix("| ").partition(",")[0] if not line.startswith("|  |") else name
            rows.setdefault(name, []).append(line)
    notes = {line[2:].partition(":")[0]: line for line in table.splitlines() if line.startswith("* ")}
    return {name: _Shown(tuple(found), notes[name]) for name, found in rows.items()}


def _standing(goal: dict[str, Any]) -> str:
    if goal["value"] is None:
        return "not measured"
    stands, found = "met" if goal["met"] else "missed", goal["value"]["median"]
    if not goal["limit"]:
        return f"{stands}, {found:.3g}"
    return f"{stands}, {found / goal['limit']:.3g}x the limit"


def _quantity(value: float, unit: str) -> str:
    match unit:
        case "seconds" | "s":
            return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
        case "bytes":
            return f"{value / 1e3:.0f} kB" if abs(value) < 1e6 else f"{value / 1e6:.1f} MB"
        case _:
            return f"{value:.3g}{'x' if unit == 'x' else ' ' + unit}"
