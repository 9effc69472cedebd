"""What a visitor runs first: it ends by itself, and says what each hospital has spent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import fedge
from safetensors.torch import load_file

from fedge_sim.demo.hospitals import HOSPITALS, model


@pytest.mark.slow
def test_the_demo_trains_privately_and_says_what_each_hospital_has_spent(tmp_path: Path) -> None:
    done = fedge("demo", "--out", tmp_path, cwd=tmp_path, seconds=300)
    assert done.returncode == 0, done.stderr
    for hospital in HOSPITALS:
        (row,) = re.findall(rf"^│ {hospital} +│ +\d+ │(.*)│$", done.stdout, re.MULTILINE)
        first, second, both, allowed = (float(cell) for cell in row.split("│"))
        assert 0 < first <= 4
        assert 0 < second <= 4
        assert max(first, second) < both <= allowed == 8
    seen = " ".join(done.stdout.split())
    assert re.search(r"could read \d+ sums of [45] updates or more, and who took part", seen)
    assert "could not read any single update" in seen
    for name in ("fedavg", "mirrored_sgd"):
        model().load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
