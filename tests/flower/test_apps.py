"""Apps that are wrong, and Grids that are used by hand: one clear error each."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedge.errors import ConfigError, LimitError, TaskError
from fedge_client.apps.process import Setting
from fedge_flower.app import FlowerApp, parse_settings
from fedge_flower.grid import AppGrid
from fedge_flower.internals import SUPERLINK_NODE_ID, be
from fedge_sim.flower.local import local_grid
from fedge_sim.flower.simulation import simulate_app

APPS = Path(__file__).parent / "apps"
PYPROJECT = (APPS / "numpy_quickstart/pyproject.toml").read_text()


@pytest.fixture(autouse=True)
def imports() -> Iterator[None]:
    """Apps of one name in several folders are several apps."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.endswith("app") or "app." in name:
            del sys.modules[name]


def app_in(folder: Path, old: str = "", new: str = "") -> Path:
    shutil.copytree(APPS / "numpy_quickstart", folder / "app")
    assert old in PYPROJECT
    (folder / "app/pyproject.toml").write_text(PYPROJECT.replace(old, new))
    return folder / "app"


def test_an_app_is_what_its_pyproject_says():
    app = FlowerApp.load(APPS / "numpy_quickstart")
    assert (app.name, app.version, app.nodes) == ("fedge-tests/numpy-quickstart", "1.0.0", 4)
    assert app.config == {"num-server-rounds": 3, "step": 0.5, "report.path": ""}
    assert FlowerApp.load(APPS / "torch_quickstart").nodes == 10


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[tool.flwr", "[tool.other", r"expected a table \[tool\.flwr\]"),
        ("[project]", "[wrong]", r"expected a table \[project\]"),
        ('version = "1.0.0"', "version = 3", r"project\.version: expected a text, found 3"),
        ('publisher = "fedge-tests"', "", r"tool\.flwr\.app\.publisher: expected a text, found None"),
        ("numpyapp.client_app:app", "numpyapp.client_app", r"clientapp: expected package\.module:object"),
        ("step = 0.5", "step = [1]", r"config\.step: expected a number, a text, true or false, found a list"),
        ("num-supernodes = 4", "num-supernodes = 0", "num-supernodes: expected a number of nodes, found 0"),
        ("[project]", "[project", "pyproject.toml: "),
    ],
)
def test_a_pyproject_that_is_wrong_is_said_to_be_so(old: str, new: str, says: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        FlowerApp.load(app_in(tmp_path, old, new))


def test_a_folder_without_an_app_is_said_to_be_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a Flower app's settings, found no such file"):
        FlowerApp.load(tmp_path)
    (tmp_path / "pyproject.toml").write_bytes(b"x" * (1 << 21))
    with pytest.raises(ConfigError, match="expected at most"):
        FlowerApp.load(tmp_path)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a=1 b=0.5", "c=true"], {"a": 1, "b": 0.5, "c": True}),
        (["text='a b' other=\"c\""], {"text": "a b", "other": "c"}),
        ([], {}),
    ],
)
def test_settings_are_read_as_flower_reads_them(texts: list[str], expected: dict[str, Any]):
    assert parse_settings(texts) == expected


def test_settings_may_be_a_file(tmp_path: Path):
    (tmp_path / "more.toml").write_text("step = 2.0\n[report]\npath = 'x'\n")
    found = parse_settings([str(tmp_path / "more.toml"), "step=3.0"])
    assert found == {"step": 3.0, "report.path": "x"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a", "expected KEY=VALUE"),
        ("a=1 b", "expected KEY=VALUE"),
        ("a=word", "a: expected a number, true, false or a quoted text, found word"),
        ("a=[1]", "expected a number, a text"),
        ("missing.toml", "no such file"),
    ],
)
def test_settings_that_are_none_are_refused(text: str, says: str):
    with pytest.raises(ConfigError, match=says):
        parse_settings([text])


def test_a_setting_that_the_app_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="the app has no setting steps; it has num-server-rounds, report"):
        FlowerApp.load(APPS / "numpy_quickstart").with_config({"steps": 1})


@pytest.mark.parametrize(
    ("named", "says"), [({"nodes": 0}, "--nodes: expected 1 to"), ({"nodes": 2, "workers": 0}, "--workers")]
)
def test_there_are_some_nodes_and_processes(named: dict[str, int], says: str):
    app = FlowerApp.load(APPS / "numpy_quickstart")
    with pytest.raises(ConfigError, match=says):
        simulate_app(app, config=app.config, **named)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "numpyapp.server_app:app",
            "numpyapp.server_app:nothing",
            "numpyapp.server_app:nothing: Attribute",
        ),
        (
            "numpyapp.server_app:app",
            "numpyapp.nowhere:app",
            "cannot load numpyapp.nowhere:app: ModuleNotFoundError",
        ),
        ("numpyapp.server_app:app", "numpyapp.client_app:app", "to be a ServerApp, found a ClientApp"),
        (
            "numpyapp.client_app:app",
            "numpyapp.nowhere:app",
            "cannot load numpyapp.nowhere:app: ModuleNotFoundError",
        ),
        ("step = 0.5", "other = 0.5", ""),
        ("num-server-rounds = 3", "rounds = 3", "its ServerApp failed: KeyError: 'num-server-rounds'"),
    ],
    ids=["no object", "no module", "another kind", "no client", "clients that fail", "a server that fails"],
)
def test_an_app_that_cannot_run_ends_with_the_reason(old: str, new: str, says: str, tmp_path: Path):
    app = FlowerApp.load(app_in(tmp_path, old, new))
    if not says:  # every reply is an error: Flower's strategy goes on without
        assert simulate_app(app, config=app.config, nodes=4, workers=1).replies == 24
        return
    with pytest.raises(TaskError, match=says):
        simulate_app(app, config=app.config, nodes=4, workers=1)


@pytest.fixture
def grid() -> Iterator[AppGrid]:
    be(run_id=9, node_id=SUPERLINK_NODE_ID)
    app = FlowerApp.load(APPS / "several_actions")
    with local_grid(Setting(str(app.folder), 9, app.config, 0), nodes=3, workers=2) as found:
        yield found


def question(node: int, **named: Any) -> Message:
    return Message(RecordDict({"question": ConfigRecord({"a": 1})}), node, "query", **named)


def test_many_threads_may_use_a_grid_at_once(grid: AppGrid):
    nodes, found = list(grid.get_node_ids()), []

    def ask() -> None:
        found.extend(grid.send_and_receive([question(each) for each in nodes]))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(reply.content["config"]["times"] for reply in found)
    assert times == sorted([*range(1, 9)] * 3), (
        "each message was dealt with once, and each node's one after the other"
    )


def test_nodes_are_the_same_each_time_and_those_that_are_not_there_get_nothing(grid: AppGrid):
    nodes = list(grid.get_node_ids())
    assert [each.node_id for each in grid.get_nodes()] == nodes
    assert len(set(nodes)) == 3
    replies = list(grid.send_and_receive([question(nodes[0]), question(12345)]))
    assert [each.metadata.src_node_id for each in replies] == nodes[:1]
    assert list(grid.push_messages([question(12345)])) == [""]


def test_a_message_is_sent_once_and_replies_are_no_messages(grid: AppGrid):
    (node, *_) = grid.get_node_ids()
    message = question(node)
    (reply,) = grid.send_and_receive([message])
    for odd in (message, reply):
        with pytest.raises(ValueError, match="expected a new message with time to live"):
            grid.push_messages([odd])


def test_a_reply_is_given_out_once_and_not_after_its_time(grid: AppGrid):
    (node, *_) = grid.get_node_ids()
    message = grid.create_message(RecordDict({"question": ConfigRecord()}), "query", node, "3")
    ids = list(grid.push_messages([message]))
    found: list[Message] = []
    while not found:
        found = list(grid.pull_messages(ids))
    assert found[0].metadata.group_id == "3"
    assert list(grid.pull_messages(ids)) == []
    (late,) = grid.send_and_receive([question(node, ttl=1e-6)])
    assert (late.error.code, "no reply within" in str(late.error.reason)) == (3, True)
    ids = list(grid.push_messages([question(node, ttl=1e-6)]))
    assert [each.has_error() for each in grid.pull_messages(ids)] == [True]


def write(folder: Path, client: str) -> FlowerApp:
    """The quickstart with other clients."""
    app_in(folder)
    (folder / "app/numpyapp/client_app.py").write_text(client)
    return FlowerApp.load(folder / "app")


ANSWERS = """
from flwr.app import ConfigRecord, Message, RecordDict
app = ClientApp()

@app.query()
def query(message, context):
    return Message(RecordDict({"config": ConfigRecord({"pid": os.getpid()})}), reply_to=message)
"""


@contextmanager
def grid_of(app: FlowerApp, *, nodes: int = 2, workers: int = 1) -> Iterator[AppGrid]:
    be(run_id=9, node_id=SUPERLINK_NODE_ID)
    with local_grid(Setting(str(app.folder), 9, app.config, 0), nodes=nodes, workers=workers) as found:
        yield found


def test_a_timeout_shorter_than_it_takes_to_load_the_app_means_fewer_replies(tmp_path: Path):
    app = write(tmp_path, "import os, time\nfrom flwr.clientapp import ClientApp\ntime.sleep(3)\n" + ANSWERS)
    with grid_of(app) as grid:
        nodes = list(grid.get_node_ids())
        assert list(grid.send_and_receive([question(each) for each in nodes], timeout=0.5)) == []
        assert len(list(grid.send_and_receive([question(each) for each in nodes], timeout=60))) == 2


def test_a_client_that_dies_while_what_it_has_started_lives_on_is_noticed(tmp_path: Path):
    app = write(
        tmp_path,
        "import os, signal, time\nfrom flwr.clientapp import ClientApp\n"
        + ANSWERS
        + """
@app.train()
def train(message, context):
    if not os.fork():
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    with grid_of(app) as grid:
        (node, _) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([Message(RecordDict(), node, "train")], timeout=60)
        assert (reply.error.code, reply.error.reason) == (8, "killed by signal 9")
        (reply,) = grid.send_and_receive([question(node)], timeout=60)
        assert reply.has_content()


def test_what_is_too_large_is_refused_where_it_is_made(tmp_path: Path):
    app = write(
        tmp_path,
        "import os\nfrom flwr.clientapp import ClientApp\n"
        + ANSWERS
        + """
@app.train()
def train(message, context):
    context.state["kept"] = ConfigRecord({"much": b"x" * (17 << 20)})
    return Message(RecordDict(), reply_to=message)
""",
    )
    with grid_of(app) as grid:
        (node, _) = grid.get_node_ids()
        much = RecordDict({"much": ConfigRecord({"bytes": b"x" * (17 << 20)})})
        with pytest.raises(LimitError, match="records without their arrays of at most 16777216 bytes"):
            grid.push_messages([question(node), Message(much, node, "query")])
        assert grid.sent == 0, "none of them was sent"
        (reply,) = grid.send_and_receive([Message(RecordDict(), node, "train")], timeout=60)
        assert "cannot be sent, or kept" in str(reply.error.reason)
        assert next(iter(grid.send_and_receive([question(node)], timeout=60))).has_content()
