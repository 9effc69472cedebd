"""The results folder: three tellings of one history that agree, and a model that torch takes as it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from fedge import RunConfig, __version__
from fedge.errors import ConfigError
from fedge.history import Row
from fedge.vector import Model
from fedge_client.torch.flat import FlatModule
from fedge_sim import Result
from fedge_sim.folders import prepare_folder
from fedge_sim.report import write_results

RUN = RunConfig.from_table({"name": "trial", "task": "app:task", "rounds": 3, "seed": 5}, source="run.toml")


class Net(nn.Module):
    """Of everything a state dict may hold: a tied weight, a buffer, an integer, half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.half = nn.Linear(3, 2).half()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture(scope="module")
def flat() -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(Net())


def row(round: int, **metrics: float) -> Row:
    return Row(round, 1, ("a", "b"), 10 * round, 0.125, 100, 200, round - 1, metrics=metrics)


def result(flat: FlatModule, history: tuple[Row, ...], **changes: Any) -> Result:
    fields = {"status": "done", "reason": "", "strategy": "FedAvg()"} | changes
    return Result(RUN, 7, history, Model(flat.vector.copy(), flat.layout), **fields)


HISTORY = (
    row(1, train_loss=0.1),
    row(2, train_loss=1e-17, loss=0.30000000000000004),
    row(3, **{"f1, macro": 0.5, 'the "best"': -0.0}),
)


@pytest.fixture
def folder(tmp_path: Path, flat: FlatModule) -> Path:
    write_results(tmp_path, result(flat, HISTORY))
    return tmp_path


def test_it_is_four_files(folder: Path):
    names = {path.name for path in folder.iterdir()}
    assert names == {"history.csv", "history.jsonl", "manifest.json", "model.safetensors"}


def test_the_json_lines_are_the_history(folder: Path):
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows == [each.as_dict() for each in HISTORY]


def test_the_csv_is_the_history_to_the_last_digit_with_a_column_for_every_metric(folder: Path):
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["train_loss", "loss", "f1, macro", 'the "best"']
    assert list(rows[0])[-4:] == names
    for found, expected in zip(rows, HISTORY, strict=True):
        assert int(found["round"]) == expected.round
        assert int(found["clients"]) == 2, "how many took part"
        assert int(found["num_examples"]) == expected.num_examples
        assert float(found["seconds"]) == expected.seconds
        assert int(found["refused"]) == expected.refused
        metrics = {name: float(found[name]) for name in names if found[name]}
        assert metrics == dict(expected.metrics)


def test_the_manifest_says_what_made_the_result_and_agrees_with_the_rest(folder: Path, flat: FlatModule):
    manifest = json.loads((folder / "manifest.json").read_text())
    summary = manifest["summary"]
    assert (summary["name"], summary["seed"], summary["rounds"], summary["clients"]) == ("trial", 5, 3, 7)
    assert summary["seconds"] == sum(each.seconds for each in HISTORY)
    assert (summary["bytes_down"], summary["bytes_up"]) == (300, 600)
    assert summary["metrics"] == dict(HISTORY[-1].metrics)
    assert summary["parameters"] == flat.layout.size
    assert manifest["layout_sha256"] == flat.layout.digest.hex()
    assert RunConfig.from_table(manifest["run"], source="manifest") == RUN, "it can be run again from it"
    assert manifest["versions"]["fedge"] == __version__
    assert {"python", "numpy", "torch"} <= set(manifest["versions"])


def test_the_model_loads_into_torch_as_it_is(folder: Path, flat: FlatModule):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    fresh = Net()
    assert not torch.equal(fresh.embed.weight, flat.module.embed.weight)
    fresh.load_state_dict(state)
    for name, value in flat.module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
        assert state[name].dtype == value.dtype


def test_the_same_result_gives_the_same_files_but_for_the_date(tmp_path: Path, flat: FlatModule):
    for name in ("one", "two"):
        write_results(prepare_folder(tmp_path / name / "deep"), result(flat, HISTORY))
    for name in ("history.csv", "history.jsonl", "model.safetensors"):
        one, two = (tmp_path / which / "deep" / name for which in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_run_that_committed_nothing_has_results_too(tmp_path: Path, flat: FlatModule):
    write_results(tmp_path, result(flat, (), status="failed", reason="round 1: nobody came"))
    assert (tmp_path / "history.jsonl").read_text() == ""
    assert (tmp_path / "history.csv").read_text().startswith("round,attempt,clients")
    summary = json.loads((tmp_path / "manifest.json").read_text())["summary"]
    assert (summary["status"], summary["reason"]) == ("failed", "round 1: nobody came")
    assert summary["metrics"] == {}


def test_numbers_that_json_has_no_word_for_do_not_break_the_files(tmp_path: Path, flat: FlatModule):
    """A mean of absurd metrics is NaN; strict readers refuse a bare NaN."""
    write_results(tmp_path, result(flat, (row(1, loss=float("nan")),)))

    def refuse(word: str) -> None:
        raise AssertionError(f"found {word}")

    for name in ("manifest.json", "history.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)


def test_the_last_metrics_are_those_of_the_last_round_that_has_any(flat: FlatModule):
    assert result(flat, (row(1, loss=1.0), row(2))).metrics == {"loss": 1.0}
    assert result(flat, ()).metrics == {}
    assert result(flat, ()).privacy.unit == "none"


def test_a_folder_that_cannot_be_is_said_before_the_work_begins(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="--out: expected a folder that can be made"):
            prepare_folder(path)
    np.testing.assert_equal(prepare_folder(tmp_path), tmp_path)


def test_the_table_of_a_result_has_the_numbers_of_the_csv_file(flat: FlatModule, tmp_path: Path):
    made = result(flat, HISTORY)
    write_results(prepare_folder(tmp_path), made)
    with (tmp_path / "history.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    table = made.table()
    assert [row["clients"] for row in table] == [2, 2, 2]
    assert "loss" not in table[0]
    for row, line in zip(table, found, strict=True):
        assert {name: float(value) for name, value in line.items() if value} == row
