"""What a ledger says to its owner: what was spent, and whom the number is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedge.errors import ConfigError, RefusedError
from fedge.events import OrderId
from fedge.privacy.config import Protected
from fedge.privacy.mechanism import Gaussian
from fedge.privacy.rdp import epsilon_of
from fedge_client.commands import app
from fedge_client.ledger import Ledger
from fedge_client.ledger_file import HEADS
from fedge_client.ledger_report import Place, print_report, report, verify
from fedge_client.settings import ClientSettings

SETTINGS = ClientSettings(server="h:1")
DELTA = SETTINGS.policy.delta


def spend(folder: Path, run_id: str, unit: Protected, mechanism: Gaussian) -> None:
    with Ledger.open(folder / "ledger", "default", DELTA, head_folder=folder) as ledger:
        entry = ledger.reserve(run_id, OrderId("train", 1), mechanism, unit=unit, max_epsilon=100.0)
        ledger.sending(entry)
        ledger.commit(entry, mechanism)


def test_each_run_says_whom_it_protected_and_the_whole_whom_its_number_is_about(tmp_path: Path):
    spend(tmp_path, "whole", "client", Gaussian(4.0))
    found = report(Place.of(SETTINGS, tmp_path))
    assert (found.total.protects, found.total.releases) == ("client", (str(Gaussian(4.0)),))
    spend(tmp_path, "each", "example", Gaussian(3.0))
    found = report(Place.of(SETTINGS, tmp_path))
    assert [(run.name, run.protects) for run in found.runs] == [("whole", "client"), ("each", "example")]
    assert found.total.protects == "example"
    assert found.total.epsilon == pytest.approx(epsilon_of((Gaussian(2.0), Gaussian(3.0)), DELTA))
    assert found.left == pytest.approx(SETTINGS.policy.max_epsilon - found.total.epsilon)
    assert verify(Place.of(SETTINGS, tmp_path)) == 6


def flower_ledger(folder: Path, dataset: str, delta: float, releases: int) -> None:
    """As `fedge_client.flower.protect_examples` keeps one."""
    with Ledger.open(folder, dataset, delta, head_folder=folder / HEADS) as ledger:
        for at in range(releases):
            order = OrderId("train", at + 1)
            entry = ledger.reserve("flower-3", order, Gaussian(4.0), unit="example", max_epsilon=100.0)
            ledger.sending(entry)
            ledger.commit(entry, Gaussian(4.0))


def test_a_folder_of_ledgers_is_told_one_by_one_each_at_the_delta_that_it_was_kept_at(tmp_path: Path):
    flower_ledger(tmp_path, "partition-0", 1e-3, 2)
    flower_ledger(tmp_path, "partition-1", 1e-6, 1)
    for arguments in ([], ["--dataset", "partition-1"]):
        done = CliRunner().invoke(app, ["ledger", str(tmp_path), "--json", "--verify", *arguments])
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)
        told = {
            each["dataset"]: (each["delta"], each["verified"], each["cap"], each["left"]) for each in found
        }
        expected = {"partition-0": (1e-3, 6, None, None), "partition-1": (1e-6, 3, None, None)}
        assert told == ({"partition-1": expected["partition-1"]} if arguments else expected)
    shown = CliRunner().invoke(app, ["ledger", str(tmp_path)]).output
    assert shown.count("at delta 0.001") == 1
    assert " of " not in shown.split("spent")[1].splitlines()[0]


def test_a_ledger_in_a_folder_that_was_put_back_is_refused_until_its_owner_accepts_it(tmp_path: Path):
    flower_ledger(tmp_path, "data", 1e-6, 1)
    kept = (tmp_path / "data.ledger").read_bytes()
    flower_ledger(tmp_path, "data", 1e-6, 1)
    (tmp_path / "data.ledger").write_bytes(kept)
    assert isinstance(CliRunner().invoke(app, ["ledger", str(tmp_path)]).exception, RefusedError)
    assert "recorded" in CliRunner().invoke(app, ["ledger", str(tmp_path), "--trust"]).output
    (found,) = json.loads(CliRunner().invoke(app, ["ledger", str(tmp_path), "--json"]).output)
    assert (found["delta"], found["records"]) == (1e-6, 4)


def test_a_ledger_of_a_folder_that_was_deleted_is_missed(tmp_path: Path):
    flower_ledger(tmp_path, "kept", 1e-6, 1)
    flower_ledger(tmp_path, "deleted", 1e-6, 1)
    (tmp_path / "deleted.ledger").unlink()
    shown = CliRunner().invoke(app, ["ledger", str(tmp_path), "--verify"])
    assert isinstance(shown.exception, RefusedError)
    assert "it was deleted" in str(shown.exception)
    arguments = ["ledger", str(tmp_path), "--dataset", "deleted", "--trust"]
    assert "recorded" in CliRunner().invoke(app, arguments).output
    assert CliRunner().invoke(app, ["ledger", str(tmp_path), "--verify"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["folder"], "expected the ledger of a data set, found none"),
        (["folder/ledgers", "--dataset", "other"], "expected the ledger of other, found those of data"),
        (["folder/client.toml", "--dataset", "data"], "leave it out"),
    ],
    ids=["none", "another", "of a client.toml"],
)
def test_what_is_not_there_is_said(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    flower_ledger(tmp_path / "folder/ledgers", "data", 1e-6, 1)
    with pytest.raises(ConfigError, match=says):
        CliRunner().invoke(app, ["ledger", *arguments], catch_exceptions=False)


def test_a_table_for_people_holds_it_all(tmp_path: Path):
    spend(tmp_path, "whole", "client", Gaussian(4.0))
    spend(tmp_path, "each", "example", Gaussian(3.0))
    console = Console(record=True, width=120, markup=False)
    print_report(console, report(Place.of(SETTINGS, tmp_path)))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[2][:3] == ["whole", "the", "site"]
    assert lines[3][:3] == ["each", "an", "example"]
    assert lines[4][:4] == ["all", "runs", "an", "example"]
