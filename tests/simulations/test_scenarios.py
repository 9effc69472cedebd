"""The scenarios give what the documentation says of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "simulations/scenarios"


def table() -> dict[str, list[str]]:
    """The documentation's rows, by scenario."""
    rows = {}
    for line in (ROOT / "docs/explanation/privacy.md").read_text().splitlines():
        if line.startswith("| `") and line.count("|") == 8:
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name.strip("`")] = cells
    return rows


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("scenario_accuracy", FOLDER / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_scenario_is_in_the_table_and_nothing_else(script: Any):
    assert list(table()) == [path.stem for path in script.scenarios()]


@pytest.mark.parametrize("name", sorted(table()))
def test_a_scenario_is_as_accurate_and_as_private_as_is_said(script: Any, name: str):
    clients, unit, asked, stated, _, accuracy = table()[name]
    mean = float(accuracy.partition("%")[0]) / 100
    found = script.reach(FOLDER / f"{name}.toml", seed=11)
    assert found.accuracy >= mean - 0.045
    assert (f"{found.epsilon:.2f}" if unit != "none" else "") == stated
    assert unit == "none" or float(stated) <= float(asked)
    assert clients in ("5", "10", "200")
