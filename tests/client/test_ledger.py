"""The ledger's file: what left is never forgotten, whatever crashes, is cut off, put back or written over."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.errors import RefusedError
from fedge.events import OrderId
from fedge.faults import Faults
from fedge.privacy.mechanism import Gaussian, SampledGaussian
from fedge.privacy.pld import reference_rdp
from fedge.refusal import RefusalCode
from fedge_client.ledger import Ledger, accept_head
from fedge_client.ledger_file import read_only

DELTA = 1e-5
STEP = SampledGaussian(1.0, 0.1, 5)
POINTS = ("append", "half", "written", "synced", "head", "done")


def opened(folder: Path, **more: Any) -> Ledger:
    return Ledger.open(folder / "ledger", "data", DELTA, head_folder=folder, **more)


def spend(ledger: Ledger, count: int = 1, cap: float = 100.0) -> None:
    for round in range(count):
        entry = ledger.reserve("run", OrderId("train", round + 1), STEP, unit="example", max_epsilon=cap)
        ledger.sending(entry)
        ledger.commit(entry, STEP)


def unusable(folder: Path, says: str) -> None:
    with pytest.raises(RefusedError, match=says) as error:
        opened(folder)
    assert error.value.refusal.code == RefusalCode.LEDGER_UNUSABLE


def spent(folder: Path) -> float:
    with opened(folder) as ledger:
        return ledger.books.spent().epsilon(DELTA)


def test_what_was_spent_is_there_after_a_restart(tmp_path: Path):
    with opened(tmp_path) as ledger:
        spend(ledger, 3)
    assert spent(tmp_path) == pytest.approx(reference_rdp([SampledGaussian(1.0, 0.1, 15)], DELTA), abs=1e-6)
    assert (tmp_path / "ledger" / "data.ledger").stat().st_mode & 0o777 == 0o600


def test_a_crash_releases_what_was_not_sent_and_charges_what_may_have_been(tmp_path: Path):
    ledger = opened(tmp_path)
    ledger.reserve("run", OrderId("train", 1), STEP, unit="example", max_epsilon=9)
    sent = ledger.reserve("run", OrderId("train", 2), STEP, unit="example", max_epsilon=9)
    ledger.sending(sent)
    ledger.close()
    with opened(tmp_path) as again:
        assert not again.books.open
        assert again.books.spent().mechanisms == (STEP,)


def test_an_exhausted_budget_refuses_at_once_and_after_a_restart(tmp_path: Path):
    with opened(tmp_path) as ledger, pytest.raises(RefusedError) as error:
        spend(ledger, 1000, cap=5.0)
    assert error.value.refusal.code == RefusalCode.BUDGET_EXHAUSTED
    assert 4 < spent(tmp_path) <= 5
    with opened(tmp_path) as ledger, pytest.raises(RefusedError, match="left"):
        spend(ledger, 1, cap=5.0)


def test_what_is_set_aside_counts_against_the_cap(tmp_path: Path):
    with opened(tmp_path) as ledger:
        costly = Gaussian(1.0)
        ledger.reserve("run", OrderId("train", 1), costly, unit="example", max_epsilon=6.0)
        with pytest.raises(RefusedError):
            ledger.reserve("run", OrderId("train", 2), costly, unit="example", max_epsilon=6.0)


# Somebody's hands on the file.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_byte_that_is_changed_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("ledger")
    with opened(folder) as ledger:
        spend(ledger, 2)
    path = folder / "ledger" / "data.ledger"
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    unusable(folder, "data.ledger")


def test_every_line_that_is_cut_off_is_noticed(tmp_path: Path):
    with opened(tmp_path) as ledger:
        spend(ledger, 2)
    path = tmp_path / "ledger" / "data.ledger"
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        unusable(tmp_path, "cut off|deleted|no ledger")
    path.write_bytes(b"".join(lines))
    assert spent(tmp_path) > 0


def test_an_older_copy_is_noticed_by_the_head_and_with_an_older_head_by_a_witness(tmp_path: Path):
    path, head = tmp_path / "ledger" / "data.ledger", tmp_path / "data.head"
    with opened(tmp_path) as ledger:
        spend(ledger)
    old = path.read_bytes(), head.read_bytes()
    with opened(tmp_path) as ledger:
        spend(ledger)
        seen = ledger.head
    path.write_bytes(old[0])
    unusable(tmp_path, "older copy")
    head.write_bytes(old[1])
    with opened(tmp_path) as ledger, pytest.raises(RefusedError, match="older copy"):
        ledger.check_witness(*seen)
    accept_head(tmp_path / "ledger", "data", DELTA, head_folder=tmp_path, reason="a backup, on purpose")
    with opened(tmp_path) as ledger:
        ledger.check_witness(*seen)
        spend(ledger)
        with pytest.raises(RefusedError, match="a witness remembers"):
            ledger.check_witness(*seen)
        with pytest.raises(RefusedError, match="a witness remembers"):
            spend(ledger)


def test_a_witness_of_an_empty_ledger_knows_of_nothing_that_could_be_missing(tmp_path: Path):
    with opened(tmp_path / "here") as ledger:
        empty = ledger.head
    with opened(tmp_path / "there") as ledger:
        assert ledger.head != empty
        ledger.check_witness(*empty)
        spend(ledger)
        ledger.check_witness(*empty)


def test_a_ledger_or_a_head_that_is_gone_is_noticed_and_its_owner_may_accept_it(tmp_path: Path):
    with opened(tmp_path) as ledger:
        spend(ledger)
    (tmp_path / "data.head").unlink()
    unusable(tmp_path, "--trust")
    assert accept_head(tmp_path / "ledger", "data", DELTA, head_folder=tmp_path, reason="moved")
    assert spent(tmp_path) > 0
    assert not accept_head(tmp_path / "ledger", "data", DELTA, head_folder=tmp_path, reason="again")
    with opened(tmp_path) as ledger:
        spend(ledger)
    assert accept_head(tmp_path / "ledger", "data", DELTA, head_folder=tmp_path, reason="in order, and yet")
    (tmp_path / "ledger" / "data.ledger").unlink()
    unusable(tmp_path, "deleted")
    assert accept_head(tmp_path / "ledger", "data", DELTA, head_folder=tmp_path, reason="begun anew")
    assert spent(tmp_path) == 0
    assert "begun anew" in (tmp_path / "ledger" / "data.ledger").read_text()


@pytest.mark.parametrize("deed", ["replaced", "removed"])
def test_a_file_that_is_replaced_while_it_is_in_use_is_noticed_before_the_next_record(
    tmp_path: Path, deed: str
):
    with opened(tmp_path) as ledger:
        spend(ledger)
        path = tmp_path / "ledger" / "data.ledger"
        if deed == "replaced":
            shutil.copy(path, tmp_path / "copy")
            (tmp_path / "copy").replace(path)
        else:
            path.unlink()
        for _ in range(2):
            with pytest.raises(RefusedError, match="was replaced or removed"):
                spend(ledger)


def test_a_second_one_at_work_with_the_data_set_is_refused(tmp_path: Path):
    with opened(tmp_path):
        unusable(tmp_path, "another client at work")
        code = f"from tests.client.test_ledger import *; opened(Path({str(tmp_path)!r}))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another client at work" in other.stderr
        # Reading it takes nobody's place.
        assert read_only(tmp_path / "ledger", "data", head_folder=tmp_path).books.spent().mechanisms == ()


# Crashes.

_WORK = """
import sys
from itertools import pairwise
from pathlib import Path
from fedge.faults import Faults
import os
from tests.client.test_ledger import STEP, OrderId, opened
ledger = opened(Path(sys.argv[1]), faults=Faults.of(os.environ))
for round in (1, 2):
    entry = ledger.reserve("run", OrderId("train", round), STEP, unit="example", max_epsilon=100.0)
    ledger.sending(entry)
    print("left", flush=True)
    ledger.commit(entry, STEP)
    ledger.release(ledger.reserve("run", OrderId("evaluate", round), STEP, unit="example", max_epsilon=100.0))
"""


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_write_nothing_that_left_is_forgotten(tmp_path: Path, point: str):
    for occurrence in range(1, 13):
        folder = tmp_path / str(occurrence)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", _WORK, str(folder)],
            env={"FEDGE_FAULT": f"ledger.{point}:{occurrence}", "PATH": "", "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=False,
        )
        left = done.stdout.count("left")
        assert done.returncode in (-9, 0), done.stderr
        with opened(folder) as ledger:
            counted = sum(each.count for each in ledger.books.spent().mechanisms) // STEP.count
            assert left <= counted <= left + 1
            assert not ledger.books.open
            spend(ledger)  # and it goes on
        if done.returncode == 0:
            return
    raise AssertionError("expected the work to end before it was killed so often")


@pytest.mark.parametrize("point", POINTS[:-1])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_full_disk_fails_closed(tmp_path: Path, point: str, at: int):
    ledger = opened(tmp_path, faults=Faults(f"ledger.{point}", at=at, action="fail", times=1))
    with pytest.raises(RefusedError, match="cannot be written"):
        spend(ledger, 3)
    with pytest.raises(RefusedError, match="cannot be written"):
        spend(ledger)  # nothing more, although there is room again
    ledger.close()
    with opened(tmp_path) as again:
        spend(again)


def test_a_line_is_what_anybody_can_check(tmp_path: Path):
    with opened(tmp_path) as ledger:
        spend(ledger)
    lines = [json.loads(line) for line in (tmp_path / "ledger" / "data.ledger").read_text().splitlines()]
    assert [line.get("kind", "header") for line in lines] == ["header", "reserve", "sending", "commit"]
    assert all(line["previous"] == before["hash"] for before, line in pairwise(lines))
    assert lines[-1]["epsilon"] == pytest.approx(reference_rdp([STEP], DELTA), abs=1e-6)
