"""The page that compares fedge with Flower has all of its rows, and says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import BEGIN, END, ROWS, rewrite_comparison

PAGE = Path(__file__).parents[1] / "docs/explanation/compared-with-flower.md"
SMALL = "a round of 10 kB between 2 nodes, the same app"
MEMORY = "what a coordinator's memory grows by in that"


def case(ours: list[float], theirs: list[float], value: str = "seconds") -> dict[str, Any]:
    others = ("seconds", "outside_rounds_seconds", "first_seconds", "server_growth_bytes")
    sides = {
        side: {"samples": [{"values": {**dict.fromkeys(others, 1.0), value: each}} for each in values]}
        for side, values in (("fedge", ours), ("Flower's SuperLink", theirs))
    }
    return {"sides": sides, "date": "2026-11-30", "repeat": len(ours), "quick": False}


def rewritten(folder: Path, table: str, cases: dict[str, Any]) -> dict[str, str]:
    """The rows of a page with this table, after these cases were measured."""
    page, results = folder / "page.md", folder / "results.json"
    page.write_text(f"before\n{BEGIN}\n{table}\n{END}\nafter\n")
    results.write_text(json.dumps({"cases": cases}))
    rewrite_comparison(page, results)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    return {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}


def test_the_page_has_all_rows():
    text = PAGE.read_text()
    assert [row.what for row in ROWS if f"| {row.what} |" not in text] == []


def test_ratios_are_of_samples_of_one_repetition(tmp_path: Path):
    found = rewritten(tmp_path, "", {"F1-2": case([1.0, 4.0, 2.0], [100.0, 100.0, 1000.0])})
    assert "| 0.01x (0.002 to 0.04) | 100 times faster | F1-2, 2026-11-30, 3 |" in found[SMALL]
    slower = rewritten(tmp_path, "", {"F1-2": case([3.0], [2.0])})
    assert "| 1.5x (1.5 to 1.5) | 1.5 times as much |" in slower[SMALL]


def test_rows_that_were_not_measured_again_stay_and_what_has_no_ratio_makes_no_row(tmp_path: Path):
    old = f"| {MEMORY} | 0.5x (0.5 to 0.5) | 2 times less | F1-100MB, 2020-01-01, 3 |\n| gone | of a row |"
    found = rewritten(tmp_path, old, {"F1-2": case([1.0], [2.0])})
    assert "2020-01-01" in found[MEMORY]
    assert "gone" not in found
    nothing_grew = {"F1-100MB": case([0.0], [5.0], "server_growth_bytes")}
    assert MEMORY not in rewritten(tmp_path, "", nothing_grew)


@pytest.mark.parametrize("text", ["", BEGIN, END], ids=["neither", "begin", "end"])
def test_a_page_without_its_markers_is_not_written_to(text: str, tmp_path: Path):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(text)
    results.write_text(json.dumps({"cases": {}}))
    with pytest.raises(ValueError, match="expected the lines"):
        rewrite_comparison(page, results)
    assert page.read_text() == text
