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


def load(name: str) -> Any:
    """A script of the scenarios' folder as a module."""
    spec = importlib.util.spec_from_file_location(f"scenario_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return load("accuracy")


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


def test_a_quarter_of_liars_ruin_the_mean_and_not_the_robust_reductions():
    """As docs/how-to/simulate-attacks.md shows it, in fewer rounds."""
    poisoned = load("poisoned")
    final = {label: values[-1] for label, (_, values) in poisoned.accuracies(rounds=8).items()}
    assert final["mean, nobody lies"] > 0.85
    assert final["mean"] < 0.5
    for robust in ("coordinate median", "trimmed mean"):
        assert final[robust] > final["mean, nobody lies"] - 0.06


def test_the_picture_of_liars_is_the_one_that_the_documentation_shows():
    picture = (ROOT / "docs/pictures/poisoned.svg").read_text(encoding="utf-8")
    assert all(f">{label}<" in picture for label in load("poisoned").LABELS.values())
