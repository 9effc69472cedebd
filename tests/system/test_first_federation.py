"""Everything that people type, from an empty folder to a trained model, with the real command line."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from harness import PATIENCE_S, Running, fedge, fedge_ok, free_port, run_toml, simulated, tasks_into, until
from safetensors.torch import load_file

SITES = ("client-0", "client-1")
RUN = run_toml("first", rounds=4)


@dataclass(frozen=True)
class Walk:
    """A folder in which a federation was set up by commands alone, and what they said."""

    folder: Path
    said: dict[str, str]
    clients: dict[str, Running]

    @property
    def admin(self) -> tuple[str, Path]:
        return "--admin", self.folder / "coordinator" / "admin.toml"

    @property
    def run_id(self) -> str:
        return self.said["submit"].splitlines()[-1]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The whole way to a finished run of two sites."""
    folder = tmp_path_factory.mktemp("walk")
    home, address = folder / "coordinator", f"127.0.0.1:{free_port()}"
    started: list[Running] = []
    walk = Walk(folder, {}, {})
    try:
        walk.said["init"] = fedge_ok("server", "init", home, "--listen", address)
        started.append(Running.start("server", "start", home / "server.toml", log=folder / "server.log"))
        started[0].says("coordinator ready")
        for site in SITES:
            token = walk.said[f"token {site}"] = fedge_ok(
                "server", "token", home / "server.toml", "--site", site
            )
            enrol = ("--token", token.splitlines()[-1], "--ca", home / "ca.pem", "--dir", folder / site)
            walk.said[f"enrol {site}"] = fedge_ok("client", "enrol", "--server", address, *enrol)
            tasks_into(folder / site)
        path = folder / SITES[0] / "client.toml"
        walk.said["check"] = fedge_ok("client", "check", path, "--task", "tiny:task")
        for site in SITES:
            log = folder / f"{site}.log"
            walk.clients[site] = Running.start("client", "start", folder / site / "client.toml", log=log)
            started.append(walk.clients[site])
        tasks_into(folder)
        (folder / "run.toml").write_text(RUN)
        walk.said["submit"] = fedge_ok("run", "submit", folder / "run.toml", "--watch", *walk.admin)
        yield walk
    finally:
        for running in reversed(started):
            running.end()


def test_everything_that_init_and_enrol_write_is_private(walk: Walk) -> None:
    for folder in (walk.folder / "coordinator", walk.folder / SITES[0]):
        for path in (folder, *folder.rglob("*")):
            if path.suffix == ".py" or "__pycache__" in path.parts:
                continue  # the test put it there
            wanted = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert (walk.folder / "coordinator" / "ca.pem").exists()


def test_a_token_and_a_runs_id_stand_alone_on_the_last_line(walk: Walk) -> None:
    for site in SITES:
        (token,) = walk.said[f"token {site}"].splitlines()
        assert token.startswith("fedge1.")
        assert " " not in token
    assert walk.said["submit"].splitlines() == [walk.run_id]
    assert walk.run_id.startswith("first-")


def test_check_says_of_each_thing_that_it_is_right(walk: Walk) -> None:
    words = walk.said["check"].split()
    assert words.count("ok") == 5
    assert "failed" not in words
    for what in ("settings:", "identity:", "link:", "budget:", "task:"):
        assert what in words


def test_the_run_is_listed_and_shown_for_programs(walk: Walk) -> None:
    (listed,) = [
        run for run in json.loads(fedge_ok("run", "list", "--json", *walk.admin)) if run["name"] == "first"
    ]
    assert {key: listed[key] for key in ("id", "status", "round", "rounds")} == {
        "id": walk.run_id,
        "status": "done",
        "round": 4,
        "rounds": 4,
    }
    shown = json.loads(fedge_ok("run", "show", walk.run_id, "--json", *walk.admin))
    assert shown["run_toml"] == RUN
    assert [(row["round"], row["clients"]) for row in shown["history"]] == [
        (n, [*SITES]) for n in range(1, 5)
    ]
    assert all({"loss", "bias", "train_loss"} <= row["metrics"].keys() for row in shown["history"])
    losses = [row["metrics"]["loss"] for row in shown["history"]]
    assert losses == sorted(losses, reverse=True), "it learns"
    assert [(site["name"], site["state"]) for site in shown["clients"]] == [(name, "ready") for name in SITES]
    rows = fedge_ok("run", "watch", walk.run_id, "--json", *walk.admin).splitlines()
    assert [json.loads(row) for row in rows] == shown["history"]


def test_the_tables_for_people_name_the_same(walk: Walk) -> None:
    for command in (("list",), ("show", walk.run_id)):
        out = fedge_ok("run", *command, *walk.admin)
        assert walk.run_id in out
        assert "done" in out


def test_the_exported_model_is_the_simulated_one_and_loads_as_it_is(walk: Walk) -> None:
    path = walk.folder / "model.safetensors"
    fedge_ok("run", "export", walk.run_id, "--out", path, *walk.admin)
    state = load_file(path)
    module = tiny.model()
    assert not any(module.load_state_dict(state))
    out = fedge_ok("simulate", "run.toml", "--clients", 2, "--out", "sim", "--json", cwd=walk.folder)
    assert json.loads(out)["model_sha256"] == simulated(RUN)
    same = load_file(walk.folder / "sim" / "model.safetensors")
    assert state.keys() == same.keys()
    assert all(state[name].equal(same[name]) for name in state)


def test_a_run_that_is_stopped_says_so_and_following_it_fails(walk: Walk) -> None:
    (walk.folder / "waits.toml").write_text(run_toml("waits", quorum=3, size=3))
    run_id = fedge_ok("run", "submit", walk.folder / "waits.toml", *walk.admin).splitlines()[-1]
    fedge_ok("run", "stop", run_id, *walk.admin)
    followed = fedge("run", "watch", run_id, *walk.admin)
    assert followed.returncode == 1
    assert "stopped by its owner" in " ".join(followed.stderr.split())
    fedge_ok("run", "stop", run_id, *walk.admin)  # what is over is stopped already


def test_a_run_that_nobody_joins_in_time_fails_and_submit_says_so(walk: Walk) -> None:
    text = run_toml("alone", quorum=3, size=3).replace("wait_s = 60", "wait_s = 0.5")
    (walk.folder / "alone.toml").write_text(text)
    done = fedge("run", "submit", walk.folder / "alone.toml", "--watch", *walk.admin)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("alone-")
    assert "of at least 3 clients after 0.5 s" in " ".join(done.stderr.split())


def test_a_revoked_site_is_listed_as_such_and_its_agent_ends(walk: Walk) -> None:
    """Last: it takes a site away."""

    def states() -> dict[str, str]:
        sites = json.loads(fedge_ok("site", "list", "--json", *walk.admin))
        return {site["name"]: site["state"] for site in sites}

    assert states() == dict.fromkeys(SITES, "connected")
    fedge_ok("site", "revoke", SITES[1], *walk.admin)
    assert walk.clients[SITES[1]].process.wait(PATIENCE_S) == 5
    assert "is revoked" in walk.clients[SITES[1]].output
    assert states() == {SITES[0]: "connected", SITES[1]: "revoked"}
    until(lambda: not walk.clients[SITES[1]].workers(), "its worker has ended")
