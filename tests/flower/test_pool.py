"""The processes of ClientApps: what is called off, and what cannot be loaded, costs nobody else anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedge.records import AppError, AppMessage, ErrorCode
from fedge.wire.records import Packed, pack
from fedge_client.apps.pool import Forgetful, Pool
from fedge_client.apps.process import Setting

APPS = Path(__file__).parent / "apps"
CONFIG = {"how": "", "report.path": "", "gate.path": "", "timeout": 1.0}
NODES = {1: {"partition-id": 0, "num-partitions": 2}, 2: {"partition-id": 1, "num-partitions": 2}}


def message(id: str, node: int) -> Packed:
    about = AppMessage(id, "train", node, {}, ttl=1000.0, src=1, created_at=time.time())
    return Packed(about, (memoryview(b"".join(bytes(part) for part in pack({}))),))


class Replies:
    def __init__(self) -> None:
        self.by_id: dict[str, Any] = {}

    def __call__(self, reply: Packed) -> None:
        self.by_id[reply.about.reply_to] = reply.unpacked().content

    def wait_for(self, *ids: str) -> list[Any]:
        until(lambda: set(ids) <= self.by_id.keys())
        return [self.by_id[id] for id in ids]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def setting(**config: Any) -> Setting:
    return Setting(folder=str(APPS / "unruly"), run_id=1, config={**CONFIG, **config})


def test_a_message_that_is_called_off_while_it_is_kept_does_not_end_the_next_one():
    keeping, go_on = threading.Event(), threading.Event()

    class Slow(Forgetful):
        def keep(self, node: int, reply: Packed, state: memoryview) -> None:
            keeping.set()
            go_on.wait(60)
            super().keep(node, reply, state)

    replies = Replies()
    pool = Pool(setting(), NODES, workers=1, answered=replies, memory=Slow())
    pool.give(message("A", 1))
    pool.give(message("B", 2))
    assert keeping.wait(60)
    pool.drop(["A"])
    go_on.set()
    (found,) = replies.wait_for("B")
    assert found["metrics"].metrics == {"turns": 1}
    pool.close()


def test_a_message_that_is_called_off_changes_nothing_of_its_node(tmp_path: Path):
    gate, replies = tmp_path / "gate", Replies()
    pool = Pool(setting(how="waits", **{"gate.path": str(gate)}), NODES, workers=1, answered=replies)
    for id in "AB":
        pool.give(message(id, 2))
    until(gate.with_suffix(".began").exists)  # its second
    pool.drop(["B"])
    gate.touch()
    pool.give(message("C", 2))
    (found,) = replies.wait_for("C")
    assert found["metrics"].metrics == {"turns": 2}
    pool.close()


def test_an_app_that_cannot_even_be_told_is_answered_for():
    replies = Replies()
    pool = Pool(setting(odd=b"bytes"), NODES, workers=1, answered=replies, warm=True)
    pool.give(message("A", 1))
    (found,) = replies.wait_for("A")
    assert isinstance(found, AppError)
    pool.close()


@pytest.mark.parametrize("warm", [False, True])
def test_an_app_that_does_not_load_in_time_is_answered_for(warm: bool, tmp_path: Path):
    package = tmp_path / "app/slowapp"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "client_app.py").write_text("import time\ntime.sleep(600)\n")
    text = (APPS / "unruly/pyproject.toml").read_text().replace("unrulyapp", "slowapp")
    (tmp_path / "app/pyproject.toml").write_text(text)
    replies = Replies()
    slow = Setting(folder=str(tmp_path / "app"), run_id=1, config={}, load_s=1.0)
    pool = Pool(slow, NODES, workers=1, answered=replies, warm=warm)
    pool.give(message("A", 1))
    (found,) = replies.wait_for("A")
    assert (found.code, "took longer than 1 s" in found.reason) == (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, True)
    pool.close()


def test_a_process_that_uses_too_much_memory_is_ended(tmp_path: Path):
    replies = Replies()
    greedy = Setting(folder=str(APPS / "unruly"), run_id=1, config={**CONFIG, "how": "hangs"}, memory_mb=1)
    pool = Pool(greedy, NODES, workers=1, answered=replies)
    pool.give(message("A", 2))
    pool.give(message("B", 2))
    found = replies.wait_for("B")[0]
    assert isinstance(found, AppError)
    assert "it used more than 1 MB of memory" in found.reason
    pool.close()
