"""The page that compares fedge with Flower: its table, from what was measured of both in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import FEDGE
from benchmarks.report import between, cases_in

BEGIN: Final = "<!-- table: written by `python -m benchmarks --readme` -->"
END: Final = "<!-- end of table -->"

Values = Mapping[str, float]

_HEADING: Final = "| what | fedge's, of Flower's: median (min to max) | that is | row, date, repetitions |"
_DEPLOYED, _SIMULATED, _ALONE = "Flower's SuperLink", "Flower (Ray)", "Flower"
_SCALED: Final = "Flower (one site, scaled)"


def _seconds(values: Values) -> float:
    return values["seconds"]


def _growth(values: Values) -> float:
    return values["server_growth_bytes"]


def _memory(values: Values) -> float:
    return values["peak_rss_bytes"]


def _start(values: Values) -> float:
    """From the command to the end of the first round, and what is left to do after the last."""
    return values["outside_rounds_seconds"] + values["first_seconds"]


def _bytes(values: Values) -> float:
    return values["upload_bytes"]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that both do, and how it is read from a case's samples."""

    what: str
    case: str
    peer: str
    value: Callable[[Values], float] = _seconds
    better: str = "faster"

    def of(self, case: dict[str, Any]) -> str | None:
        """As a row of the table; None where one of the two was not measured."""
        try:
            ours, theirs = (case["sides"][side]["samples"] for side in (FEDGE, self.peer))
        except KeyError:
            return None
        pairs = zip(ours, theirs, strict=True)
        ratios = [self.value(one["values"]) / self.value(other["values"]) for one, other in pairs]
        if not ratios or min(ratios) <= 0:  # a coordinator that did not grow has no ratio
            return None
        middle = statistics.median(ratios)
        shown = f"{middle:.2g}x ({min(ratios):.2g} to {max(ratios):.2g})"
        measured = f"{self.case}, {case['date']}, {case['repeat']}{' (quick)' if case['quick'] else ''}"
        return f"| {self.what} | {shown} | {_times(middle, self.better)} | {measured} |"


def _times(ratio: float, better: str) -> str:
    if ratio > 1:
        return f"{ratio:.2g} times as much"
    times = float(f"{1 / ratio:.2g}")
    return f"{times:,.0f} times {better}" if times >= 10 else f"{times:g} times {better}"


ROWS: Final = (
    Row("a round of 10 kB between 2 nodes, the same app", "F1-2", _DEPLOYED),
    Row("a round of 10 kB between 10 nodes, the same app", "F1-10", _DEPLOYED),
    Row("a round of 100 MB between 2 nodes, the same app", "F1-100MB", _DEPLOYED),
    Row("what a coordinator's memory grows by in that", "F1-100MB", _DEPLOYED, _growth, "less"),
    Row("from the command to the first round's end, 2 nodes", "F1-2", _DEPLOYED, _start),
    Row("a simulated round, 20 clients train a CNN of 1.6M parameters", "W1", _SIMULATED),
    Row("a simulated round, 100 clients train an MLP of 4.6K parameters", "W2", _SIMULATED),
    Row("memory of that simulation, all processes", "W2", _SIMULATED, _memory, "less"),
    Row("a site's part of a secure sum of 100, 1M parameters", "S3-1", _ALONE),
    Row("the coordinator's part, a tenth of the sites gone", "S4-10", _SCALED),
    Row("what a site sends in such a sum", "S5-1", _ALONE, _bytes, "less"),
)


def rewrite_comparison(page: Path, results: Path) -> None:
    """Put what was measured between the markers of `page`; rows of cases that were not stay as they are.

    Raises:
        ValueError: there are no results, or the markers are not there.
    """
    head, table, tail = between(page, BEGIN, END)
    cases = cases_in(results)
    known = {
        line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")
    }
    measured = {row.what: line for row in ROWS if row.case in cases and (line := row.of(cases[row.case]))}
    rows = [line for row in ROWS if (line := measured.get(row.what) or known.get(row.what))]
    lines = [_HEADING, "|---|---|---|---|", *rows]
    page.write_text(head + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + tail)
