"""A sweep is its runs: each as it would be alone, whatever becomes of the others."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import simulated
from typer.testing import CliRunner

from fedge.cli import app
from fedge.errors import ConfigError
from fedge_sim import simulate, sweep
from fedge_sim.sweep import Swept, combinations, parse_grid

RUN = """\
name = "trial"
task = "simulated:task"
rounds = 2
seed = 5

[cohort]
size = 3

[simulation]
clients = 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run, and its task beside it."""
    shutil.copy(simulated.__file__, tmp_path / "simulated.py")
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def test_each_run_is_what_it_is_alone(path: Path, tmp_path: Path):
    grid = {"work.learning_rate": [0.01, 0.1], "seed": [1, 2]}
    swept = sweep(path, grid, out=tmp_path / "out")
    assert [dict(each.settings) for each in swept] == [
        {"work.learning_rate": rate, "seed": seed} for rate in (0.01, 0.1) for seed in (1, 2)
    ]
    (tmp_path / "run.toml").write_text(RUN.replace("seed = 5", "seed = 2\n[work]\nlearning_rate = 0.1"))
    alone = simulate(path, task=simulated.task, engine="loop").summary()
    assert swept[3].summary["model_sha256"] == alone["model_sha256"]
    assert len({each.summary["model_sha256"] for each in swept}) == 4
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/sweep.csv").read_text())))
    assert [row["status"] for row in rows] == ["done"] * 4
    assert np.allclose(
        [float(row["accuracy"]) for row in rows], [s.summary["metrics"]["accuracy"] for s in swept]
    )
    for each in swept:
        assert json.loads((each.folder / "manifest.json").read_text())["summary"] == each.summary


def test_a_run_that_fails_or_is_killed_leaves_the_others_as_they_are(path: Path, tmp_path: Path):
    tasks = [f"simulated:{name}" for name in ("task", "unreadable", "deadly")]
    path.write_text(RUN.replace("clients = 4", "clients = 8").replace("size = 3", "size = 8"))
    good, unreadable, deadly = sweep(path, {"task": tasks}, out=tmp_path / "out", processes=1)
    assert good.summary["status"] == "done"
    assert "client-4, train order of round 1" in unreadable.error
    assert deadly.error == "killed by signal 9"
    assert unreadable.row()["status"] == deadly.row()["status"] == "failed"


def test_runs_are_told_in_the_order_of_the_grid_and_one_that_is_broken_off_has_a_table_of_them(
    path: Path, tmp_path: Path
):
    seen: list[int] = []

    def told(done: Swept) -> None:
        seen.append(done.settings["seed"])
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        # The first takes longest.
        sweep(path, {"rounds": [8, 1], "seed": [1, 2]}, out=tmp_path / "out", processes=2, told=told)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/sweep.csv").read_text())))
    assert seen == [1, 2]
    assert [(row["rounds"], row["seed"], row["status"]) for row in rows] == [
        ("8", "1", "done"),
        ("8", "2", "done"),
    ]


def test_wrong_combinations_are_told_before_anything_begins(path: Path, tmp_path: Path):
    for grid, says in [
        ({"seed": [1, -2]}, r"with seed = -2: seed: input should be greater"),
        ({"work.learning_rat": [0.1]}, r"unknown key 'work.learning_rat'; did you mean 'learning_rate'"),
        ({"name.first": ["a"]}, r"expected 'name.first' to be a key in tables, found that 'name' is none"),
        (
            {"seed": list(range(101)), "rounds": list(range(1, 101))},
            r"expected 1 to 10000 combinations, found 10100",
        ),
        ({"seed": []}, r"found 0"),
    ]:
        with pytest.raises(ConfigError, match=says):
            sweep(path, grid, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="processes: expected at least 1"):
        sweep(path, {"seed": [1]}, out=tmp_path / "out", processes=0)
    assert not (tmp_path / "out").exists()


def test_a_grid_has_no_effect_on_the_file_or_on_other_combinations(path: Path):
    made = list(combinations(path, {"cohort.quorum": [2, 3], "simulation.faults.dropout": [0.1]}))
    assert [table["cohort"] for _, table, _ in made] == [{"size": 3, "quorum": 2}, {"size": 3, "quorum": 3}]
    assert [name for _, _, name in made] == ["0", "1"]
    assert path.read_text() == RUN


@pytest.mark.parametrize("text", ["seed", "seed=1", "=[1]", "seed=[]", "seed=[1", "seed=[1]; import os"])
def test_what_is_no_list_of_values_is_refused(text: str):
    with pytest.raises(ConfigError, match=re.escape("--grid: expected KEY=[VALUE, ...]")):
        parse_grid([text])


def test_a_key_is_given_once():
    with pytest.raises(ConfigError, match="expected each key once, found 'seed' twice"):
        parse_grid(["seed=[1]", "seed = [2]"])
    assert parse_grid(["seed = [1, 2]", 'strategy.aggregation=["mean"]']) == {
        "seed": [1, 2],
        "strategy.aggregation": ["mean"],
    }


def test_the_command_prints_a_row_for_each_and_fails_if_one_has(path: Path, tmp_path: Path):
    arguments = [
        "simulate",
        str(path),
        "--grid",
        "work.learning_rate=[0.01, 1e30]",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    rows = json.loads(done.stdout)
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "not_finite" in rows[1]["reason"]
    assert done.exit_code != 0
    page = (tmp_path / "out/report.html").read_text()
    assert "trial" in page
    refused = CliRunner().invoke(app, [*arguments, "--rounds", "3"])
    assert refused.exit_code != 0
