"""What was measured, for people: a table in the terminal, and ratios alone in README.md."""

from __future__ import annotations

import json
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
    """Put the ratios of `results` between the markers of `readme`.

    Raises:
        ValueError: there are no results, or the markers are not there.
    """
    if not results.exists():
        raise ValueError(f"{results}: expected results, found none; run `python -m benchmarks` first")
    text = readme.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme}: expected the lines {BEGIN!r} and {END!r}")
    found = json.loads(results.read_text())
    readme.write_text(f"{head}{BEGIN}\n\n{as_markdown(found)}\n\n{END}{tail}")


def as_markdown(results: dict[str, Any]) -> str:
    """A row a ratio and a row a goal. Ratios and shares of the goal only: times are the machine's."""
    lines = [_COLUMNS, "|---|---|---|---|---|"]
    notes = []
    for name, case in results["cases"].items():
        rows = []
        for ratio, spread in case["ratios"].items():
            other = ratio.partition("/")[2]
            shown = f"{spread['median']:.3g} ({spread['min']:.3g} to {spread['max']:.3g})"
            rows.append(("", other, shown, "", ""))
        for goal in case["goals"]:
            limit = f"{goal['text']}: at most {_quantity(goal['limit'], goal['unit'])}"
            rows.append(("", "", "", limit, _standing(goal)))
        rows = [(f"{name}, {case['title']}" if row is rows[0] else "", *row[1:]) for row in rows]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        of = "a --quick run" if case["quick"] else f"{case['repeat']} repetitions"
        busy = (
            ""
            if case["load_before"] <= 1
            else f", on a machine busy with other work ({case['load_before']:.1f})"
        )
        notes.append(f"{name}: {of}, {case['date']}, {case['machine']}{busy}.")
    return "\n".join([*lines, "", *(f"* {note}" for note in notes)])


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
