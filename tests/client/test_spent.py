"""A site begins with an attempt once, and takes no part in a round again that it has helped to open."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import RefusedError, StorageError
from fedge.events import OrderId
from fedge.refusal import RefusalCode
from fedge_client import spent
from fedge_client.spent import SpentRounds

FIRST = OrderId("train", 1, 1)


def refused(code: RefusalCode, action: object, *arguments: object) -> None:
    assert callable(action)
    with pytest.raises(RefusedError) as found:
        action(*arguments)
    assert found.value.refusal.code == code


def test_an_attempt_is_begun_once_also_after_a_restart(tmp_path: Path):
    SpentRounds(tmp_path).begin("run", FIRST)
    again = SpentRounds(tmp_path)
    refused(RefusalCode.UPDATE_LOST, again.begin, "run", FIRST)
    again.begin("run", OrderId("train", 1, 2))
    refused(RefusalCode.UPDATE_LOST, SpentRounds(tmp_path).begin, "run", FIRST)


def test_a_round_that_was_opened_is_over_for_this_site_also_after_a_restart(tmp_path: Path):
    rounds = SpentRounds(tmp_path)
    rounds.begin("run", OrderId("train", 2, 1))
    rounds.spend("run", OrderId("train", 2, 1))
    for known in (rounds, SpentRounds(tmp_path)):
        refused(RefusalCode.ROUND_SPENT, known.begin, "run", OrderId("train", 2, 2))
        refused(RefusalCode.ROUND_SPENT, known.begin, "run", OrderId("train", 1, 9))
        refused(RefusalCode.ROUND_SPENT, known.spend, "run", OrderId("train", 2, 1))
    rounds.begin("run", OrderId("train", 3, 1))
    rounds.begin("run", OrderId("evaluate", 2, 1))
    rounds.begin("other run", FIRST)


def test_what_cannot_be_noted_is_not_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rounds = SpentRounds(tmp_path)
    rounds.begin("run", FIRST)

    def full(path: Path, data: object) -> None:
        raise StorageError(f"{path}: cannot be written: no space left")

    with monkeypatch.context() as broken:
        broken.setattr(spent, "write_private", full)
        for action in (rounds.begin, rounds.spend):
            with pytest.raises(StorageError, match="no space"):
                action("run", OrderId("train", 2, 1))
    rounds.begin("run", OrderId("train", 2, 1))


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[1]", b'{"begun": {"train": 3}, "spent": {}}', b"\xff", b" " * 5000]
)
def test_a_damaged_file_lets_nothing_begin(tmp_path: Path, damage: bytes):
    SpentRounds(tmp_path).spend("run", FIRST)
    (path,) = tmp_path.glob("*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(damage)
    with pytest.raises(StorageError, match="found a damaged file"):
        SpentRounds(tmp_path).begin("run", OrderId("train", 2, 1))


def test_no_run_is_forgotten_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spent, "MAX_RUNS", 2)
    rounds = SpentRounds(tmp_path)
    rounds.spend("one", FIRST)
    rounds.spend("two", FIRST)
    with pytest.raises(StorageError, match="at most 2 runs"):
        rounds.begin("three", FIRST)
    refused(RefusalCode.ROUND_SPENT, rounds.begin, "one", FIRST)


STEPS = st.tuples(
    st.sampled_from(["begin", "spend", "restart"]),
    st.sampled_from(["train", "evaluate"]),
    st.integers(1, 4),
    st.integers(1, 3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_whatever_is_asked_attempts_only_grow_and_no_spent_round_is_begun(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int, int]]
):
    folder = tmp_path_factory.mktemp("spent")
    rounds = SpentRounds(folder)
    begun: dict[str, list[tuple[int, int]]] = {"train": [], "evaluate": []}
    opened: dict[str, list[int]] = {"train": [], "evaluate": []}
    for what, kind, round, attempt in steps:
        order = OrderId(kind, round, attempt)  # type: ignore[arg-type]  # one of them
        if what == "restart":
            rounds = SpentRounds(folder)
            continue
        may_spend = round > max(opened[kind], default=0)
        try:
            getattr(rounds, what)("run", order)
        except RefusedError:
            assert not may_spend or (what == "begin" and (round, attempt) <= max(begun[kind], default=(0, 0)))
            continue
        assert may_spend
        if what == "begin":
            assert (round, attempt) > max(begun[kind], default=(0, 0))
            begun[kind].append((round, attempt))
        else:
            opened[kind].append(round)
