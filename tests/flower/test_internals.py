"""What fedge takes from Flower's inside is what it has to be. When one of these fails, Flower has moved it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from fedge.errors import ConfigError
from fedge.records import ErrorCode
from fedge_flower import internals

ROOT = Path(__file__).parents[2]


def test_flower_is_the_version_that_this_was_made_for():
    assert re.match(r"1\.41\.", version("flwr")), (
        "look at internals.py, and at these tests, before another is allowed"
    )


def test_a_grid_has_the_members_that_ours_has():
    assert set(Grid.__abstractmethods__) == {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }
    assert hasattr(Grid, "get_nodes")


def test_a_context_has_the_parts_that_we_fill_in():
    assert [each.name for each in fields(Context)] == [
        "run_id",
        "node_id",
        "node_config",
        "state",
        "run_config",
        "series_id",
    ]


def test_messages_say_who_they_are_from_once_this_process_is_somebody():
    internals.be(run_id=5, node_id=internals.SUPERLINK_NODE_ID)
    message = Message(RecordDict(), 9, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id, message.metadata.dst_node_id) == (5, 1, 9)
    assert internals.with_id(message, message_id="x").metadata.message_id == "x"
    with pytest.raises(ConfigError, match=r"messages have no colour any more: fedge was made for flwr 1\.41"):
        internals.with_id(message, colour="red")


def test_constants_are_what_apps_are_told():
    assert (internals.PARTITION_ID_KEY, internals.NUM_PARTITIONS_KEY) == ("partition-id", "num-partitions")
    from flwr.common.constant import ErrorCode as Theirs

    assert {each.name: int(each) for each in ErrorCode}.items() <= vars(Theirs).items()
    assert internals.SType.NUMPY == "numpy.ndarray"
    assert internals.Run.create_empty(4).run_id == 4
    assert internals.NodeInfo(node_id=3).node_id == 3


def test_only_one_file_names_what_is_not_public():
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    for folder in ("flower", "fedge", "server", "client", "strategies", "simulations"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "internals.py" and path.parent.name == "fedge_flower":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert {name for name in names if name.split(".")[0] == "flwr"} <= public, path


def test_without_flwr_everything_else_works_and_the_command_says_what_to_install(tmp_path: Path):
    (tmp_path / "flwr.py").write_text("raise ModuleNotFoundError(\"No module named 'flwr'\", name='flwr')\n")
    code = "import sys; from fedge.cli import main; sys.exit(main())"

    def fedge(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert fedge("flower", "run", "--help").returncode == 0
    assert fedge("simulate", "--help").returncode == 0
    done = fedge("flower", "run", str(tmp_path))
    assert done.returncode != 0
    assert "Flower apps need flwr: pip install 'fedge[flower]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
