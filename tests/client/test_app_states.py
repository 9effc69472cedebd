"""What a site keeps of an app: states and replies in one piece, whatever becomes of the process that writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import StorageError
from fedge.records import AppError, AppMessage
from fedge.wire.records import Packed
from fedge_client.apps import states
from fedge_client.apps.states import States

NODE, OTHER = 7, 8


def reply(id: str, payload: bytes = b"reply") -> Packed:
    return Packed(AppMessage(f"{id}/reply", "train", 1, {}, reply_to=id, src=NODE), (memoryview(payload),))


def keep(kept: States, id: str, state: bytes, *, node: int = NODE) -> None:
    kept.keep(node, reply(id, f"reply {id}".encode()), memoryview(state))


def state(kept: States, node: int = NODE) -> bytes:
    return b"".join(kept.state(node))


def test_another_process_finds_the_last_state_and_every_reply_that_was_stored(tmp_path: Path):
    kept = States(tmp_path, "run")
    assert (state(kept), kept.ids, kept.reply("1")) == (b"", [], None)
    keep(kept, "1", b"one")
    keep(kept, "2", b"two")
    keep(kept, "3", b"three", node=OTHER)
    kept.store(["1", "unknown"])
    assert sorted(kept.ids) == ["1", "2", "3"]
    again = States(tmp_path, "run")
    assert (state(again), state(again, OTHER), again.ids) == (b"two", b"three", ["1"])
    found = again.reply("1")
    assert found is not None
    assert (bytes(found.payload[0]), found.about.reply_to, found.about.src) == (b"reply 1", "1", NODE)
    assert again.reply("2") is None
    keep(again, "4", b"four")
    again.store()
    third = States(tmp_path, "run")
    assert (state(third), third.ids) == (b"four", ["1", "4"])


def test_a_message_whose_reply_was_lost_is_dealt_with_from_the_state_before_it(tmp_path: Path):
    kept = States(tmp_path, "run")
    keep(kept, "1", b"one")
    kept.forget("1")
    keep(kept, "2", b"two")
    again = States(tmp_path, "run")
    assert state(again) == b"two", "nobody has said yet that it comes again"
    again.rewind(NODE, "2")
    assert state(again) == b"one"
    keep(again, "2", b"two again")
    again.forget("2")
    keep(again, "3", b"three")
    assert state(States(tmp_path, "run")) == b"three"
    first = States(tmp_path, "other run")
    keep(first, "1", b"one")
    first = States(tmp_path, "other run")
    first.rewind(NODE, "1")
    first.rewind(NODE, "unknown")
    assert state(first) == b""
    keep(first, "1", b"one again")
    assert state(States(tmp_path, "other run")) == b"one again"


def test_a_reply_that_nobody_needs_goes_and_the_state_stays(tmp_path: Path):
    kept = States(tmp_path, "run")
    for id in "123":
        keep(kept, id, f"state {id}".encode())
    kept.store(["1", "2"])
    for id in ("1", "3", "unknown"):
        kept.forget(id)
    assert (kept.ids, kept.reply("1"), kept.reply("3")) == (["2"], None, None)
    assert state(kept) == b"state 3"
    kept.forget("2")
    for at in range(4, 30):
        keep(kept, str(at), f"state {at}".encode())
        kept.forget(str(at))
    assert len(list(tmp_path.rglob("*.*"))) == 1, "the last state"
    assert state(States(tmp_path, "run")) == b"state 29"


def test_turns_that_nobody_comes_back_to_do_not_fill_the_disk(tmp_path: Path):
    for run in range(3):
        kept = States(tmp_path, "run")
        for at in range(100):
            keep(kept, f"{run}.{at}", b"x")
    assert len(list(tmp_path.rglob("*.state"))) <= states.MAX_TURNS + 1


def test_an_error_is_kept_as_a_reply_as_well(tmp_path: Path):
    failed = Packed(AppMessage("1/reply", "train", 1, AppError(2, "why"), reply_to="1", src=NODE))
    kept = States(tmp_path, "run")
    kept.keep(NODE, failed, memoryview(b"before"))
    kept.store()
    again = States(tmp_path, "run")
    found = again.reply("1")
    assert found is not None
    assert (found.about.content, found.payload) == (AppError(2, "why"), ())
    assert state(again) == b"before"


def test_a_reply_that_is_forgotten_while_it_is_stored_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = States(tmp_path, "run")
    keep(kept, "1", b"one")
    write = States._write

    def meanwhile(*arguments: Any) -> None:
        write(*arguments)
        kept.forget("1")

    monkeypatch.setattr(States, "_write", meanwhile)
    kept.store()
    assert (kept.ids, list(tmp_path.rglob("*.reply"))) == ([], [])


@pytest.mark.parametrize("cut", [0, 3, 30, -1])
@pytest.mark.parametrize("suffix", ["state", "reply"])
def test_what_is_damaged_counts_as_not_there(suffix: str, cut: int, tmp_path: Path):
    kept = States(tmp_path, "run")
    keep(kept, "1", b"one" * 20)
    keep(kept, "2", b"two" * 20)
    kept.store()
    path = max(tmp_path.rglob(f"*.{suffix}"))
    path.write_bytes(path.read_bytes()[:cut])
    again = States(tmp_path, "run")
    assert again.ids == ["1"]
    assert state(again) == (b"two" if suffix == "reply" else b"one") * 20


def test_files_of_others_are_not_read(tmp_path: Path):
    keep(States(tmp_path, "run"), "1", b"one")
    (folder,) = tmp_path.iterdir()
    (folder / "x.y.state").write_bytes(b"what")
    (folder / "7.2.state").write_bytes(os.urandom(100))
    assert state(States(tmp_path, "run")) == b"one"


def test_runs_are_apart_and_end_with_all_that_was_kept(tmp_path: Path):
    one, other = States(tmp_path, "one"), States(tmp_path, "../other")
    keep(one, "1", b"one")
    keep(other, "1", b"other")
    one.close()
    assert state(States(tmp_path, "one")) == b""
    assert state(States(tmp_path, "../other")) == b"other"
    assert {path.parent for path in tmp_path.rglob("*")} <= {tmp_path, *tmp_path.iterdir()}


def test_of_runs_whose_end_nobody_has_told_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(states, "MAX_RUNS", 3)
    for at in range(5):
        keep(States(tmp_path, f"run {at}"), "1", b"x")
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (at, at))
    assert len(list(tmp_path.iterdir())) == 3
    assert state(States(tmp_path, "run 4")) == b"x"


def test_only_its_owner_reads_what_is_kept(tmp_path: Path):
    keep(States(tmp_path / "apps", "run"), "1", b"x")
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "apps").rglob("*")} == {0}


def test_a_disk_that_takes_nothing_leaves_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = States(tmp_path, "run")
    keep(kept, "1", b"one")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(StorageError, match="an app's state cannot be kept: No space left on device"):
        keep(kept, "2", b"two")
    monkeypatch.undo()
    assert (state(kept), kept.ids) == (b"one", ["1"])
