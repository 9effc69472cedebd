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


@pytest.fixture(scope="module")
def pictures() -> Any:
    return load("pictures")


def final(series: Any) -> dict[str, float]:
    return {label: values[-1] for label, (_, values) in series.items()}


def test_a_quarter_of_liars_ruin_the_mean_and_not_the_robust_reductions(pictures: Any):
    """As docs/how-to/simulate-attacks.md shows it, in fewer rounds."""
    reached = final(pictures.series("poisoned", rounds=8))
    assert reached["mean, nobody lies"] > 0.85
    assert reached["mean"] < 0.5
    for robust in ("coordinate median", "trimmed mean"):
        assert reached[robust] > reached["mean, nobody lies"] - 0.06


def test_control_variates_correct_the_drift_of_clients_who_know_one_digit_each(pictures: Any):
    """As docs/explanation/drift.md shows it, in fewer rounds."""
    reached = final(pictures.series("drifting", rounds=12))
    assert reached["SCAFFOLD"] > 0.75
    for drawn in ("FedAvg", "FedProx"):
        assert reached[drawn] < reached["SCAFFOLD"] - 0.15


def test_a_hundred_unlike_hospitals_learn_together_and_not_all_as_well(pictures: Any):
    reached = final(pictures.series("hundred-hospitals", rounds=6))
    assert reached["mean of all"] > 0.75
    assert reached["lowest tenth"] < reached["mean of all"] - 0.1
    assert reached["highest tenth"] > reached["mean of all"] + 0.1


def test_a_secure_sum_bears_its_dropouts(pictures: Any):
    """As docs/how-to/sum-updates-securely.md says."""
    found = pictures.results("dropouts", rounds=10)
    assert all(result.status == "done" for result in found.values())
    assert [result.faults.counts["dropout"] > 20 for result in found.values()] == [False, True, True]
    reached = final(pictures.accuracy_by_round(found))
    assert min(reached.values()) > max(reached.values()) - 0.08


def test_one_slow_site_need_not_hold_up_the_others(pictures: Any):
    """As docs/how-to/simulate-time.md shows it."""
    found = pictures.results("slow-site", rounds=8)
    waits, goes_on = (result.moments[-1].virtual_s for result in found.values())
    assert goes_on < waits / 4
    reached = final(pictures.accuracy_by_hour(found))
    assert abs(reached["waits for all twenty"] - reached["goes on with sixteen"]) < 0.08


def test_phones_learn_at_night(pictures: Any):
    """As docs/how-to/simulate-time.md shows it, from six in the evening on."""
    (result,) = pictures.results("charging-phones").values()
    hours = [(18 + moment.virtual_s / 3600) % 24 for moment in result.moments]
    assert all(hour > 20.9 or hour < 9 for hour in hours)
    assert max(moment.virtual_s for moment in result.moments) > 24 * 3600, "one night is not enough"
    assert result.metrics["accuracy"] > 0.8


@pytest.mark.parametrize(
    "name", ["poisoned", "hundred-hospitals", "dropouts", "slow-site", "charging-phones"]
)
def test_a_picture_is_the_one_that_the_documentation_shows(pictures: Any, name: str):
    picture = (ROOT / f"docs/pictures/{name}.svg").read_text(encoding="utf-8")
    made = pictures.PICTURES[name]
    assert f">{made.x}<" in picture
    assert all(f">{label}<" in picture for label in made.runs if label)
    assert any(f"pictures/{name}.svg" in page.read_text() for page in (ROOT / "docs").rglob("*.md"))


def test_every_picture_of_a_scenario_is_shown(pictures: Any):
    assert {path.stem for path in (ROOT / "docs/pictures").glob("*.svg")} == set(pictures.PICTURES)
