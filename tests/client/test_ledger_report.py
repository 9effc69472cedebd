"""What a ledger says to its owner: what was spent, and whom the number is about."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fedge.events import OrderId
from fedge.privacy.config import Protected
from fedge.privacy.mechanism import Gaussian
from fedge.privacy.rdp import epsilon_of
from fedge_client.ledger import Ledger
from fedge_client.ledger_report import print_report, report, verify
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
    found = report(SETTINGS, tmp_path)
    assert (found.total.protects, found.total.releases) == ("client", (str(Gaussian(4.0)),))
    spend(tmp_path, "each", "example", Gaussian(3.0))
    found = report(SETTINGS, tmp_path)
    assert [(run.name, run.protects) for run in found.runs] == [("whole", "client"), ("each", "example")]
    assert found.total.protects == "example"
    assert found.total.epsilon == pytest.approx(epsilon_of((Gaussian(2.0), Gaussian(3.0)), DELTA))
    assert found.left == pytest.approx(SETTINGS.policy.max_epsilon - found.total.epsilon)
    assert verify(SETTINGS, tmp_path) == 6


def test_a_table_for_people_holds_it_all(tmp_path: Path):
    spend(tmp_path, "whole", "client", Gaussian(4.0))
    spend(tmp_path, "each", "example", Gaussian(3.0))
    console = Console(record=True, width=120)
    print_report(console, report(SETTINGS, tmp_path))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[2][:3] == ["whole", "the", "site"]
    assert lines[3][:3] == ["each", "an", "example"]
    assert lines[4][:4] == ["all", "runs", "an", "example"]
