"""A mistake on the command line or in a file: one clear message, the right exit code, and nothing begun."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import Federation, fedge, fedge_ok, free_port, tasks_into

from fedge.files import write_private
from fedge.wire import fedge_pb2 as pb
from fedge_server.clock import now

ADMIN = "--admin"
HEAD = 'name = "wrong"\ntask = "tiny:task"\nrounds = 1\n'

WHOLE_FILES = {
    "server.toml": (
        ("server", "start"),
        'listen = "127.0.0.1:0"\nmax_sesions = 5\nmax_runs = "many"\nspool = 7\n',
        ["unknown key 'max_sesions'; did you mean 'max_sessions'?", "max_runs: ", "'many'", "spool: "],
    ),
    "client.toml": (
        ("client", "start"),
        'server = "127.0.0.1"\n[plicy]\n[worker]\nmemory = 5\nhang_s = -1\n[policy]\ntasks = ["app"]\n',
        [
            "server: expected HOST:PORT",
            "unknown key 'plicy'; did you mean 'policy'?",
            "unknown key 'worker.memory'; did you mean 'memory_mb'?",
            "worker.hang_s: ",
            "policy.tasks.0: expected 'module:attribute', found 'app'",
        ],
    ),
    "run.toml": (
        ("run", "submit"),
        HEAD.replace("= 1", '= "1"')
        + 'unknown = 1\n[cohort]\nquorm = 2\n[work]\nepochs = 1\nsteps = 1\n[privacy]\nunit = "example"\n',
        [
            "rounds: ",
            "unknown key 'unknown'",
            "unknown key 'cohort.quorm'; did you mean 'quorum'?",
            "work: expected epochs or steps, found both",
            "privacy: clip: expected the largest norm of one example's part, found none",
        ],
    ),
}
RUNS = {
    "an unknown strategy": (HEAD + '[strategy]\nname = "fedvag"\n', "did you mean 'fedavg'?", 2),
    "an unknown field of a strategy": (
        HEAD + '[strategy]\nname = "fedavg"\nsever_learning_rate = 1.0\n',
        "did you mean 'server_learning_rate'?",
        2,
    ),
    "a strategy that only the coordinator could import": (
        HEAD + '[strategy]\nname = "os:path"\n',
        "is not one that this coordinator may import",
        2,
    ),
    "secure aggregation": (
        HEAD + '[strategy]\nname = "sgd"\n[secure_aggregation]\nenabled = true\n',
        "expected a strategy with rounds, found 'sgd'",
        2,
    ),
    "a task that is not there": (HEAD.replace("tiny:task", "nowhere:task"), "cannot import task", 3),
    "a task that is none": (
        HEAD.replace("tiny:task", "tiny:loss"),
        "expected 'tiny:loss' to be a fedge.Task",
        3,
    ),
}


def check(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    # What is said may be broken into lines.
    words = " ".join(done.stderr.split())
    assert not [text for text in said if text not in words], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_every_mistake_in_a_file_is_named_at_once(bare: Federation, tmp_path: Path, name: str) -> None:
    command, text, said = WHOLE_FILES[name]
    write_private(tmp_path / name, text)
    admin = (ADMIN, bare.admin_toml) if command[0] == "run" else ()
    check(fedge(*command, tmp_path / name, *admin), 2, str(tmp_path / name), *said)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_be_is_refused_before_it_begins(
    bare: Federation, tmp_path: Path, name: str
) -> None:
    text, said, code = RUNS[name]
    tasks_into(tmp_path)
    (tmp_path / "run.toml").write_text(text)
    check(fedge("run", "submit", tmp_path / "run.toml", ADMIN, bare.admin_toml), code, said)
    assert not [run for run in bare.admin.List(pb.ListRequest()).runs if run.name == "wrong"]


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    check(fedge("server", "start", tmp_path / "none.toml"), 2, "none.toml: expected a file, found none")
    write_private(tmp_path / "bad.toml", "listen = ")
    check(fedge("client", "start", tmp_path / "bad.toml"), 2, "bad.toml: not valid TOML")


def test_a_port_in_use_is_named_and_the_first_coordinator_serves_on(bare: Federation, tmp_path: Path) -> None:
    fedge_ok("server", "init", tmp_path / "second", "--listen", bare.address)
    check(fedge("server", "start", tmp_path / "second" / "server.toml"), 2, bare.address, "in use")
    assert bare.admin.List(pb.ListRequest()) is not None


def test_a_coordinators_folder_is_never_overwritten(bare: Federation) -> None:
    before = {path: path.read_bytes() for path in bare.home.glob("*.*")}
    done = fedge("server", "init", bare.home, "--listen", "127.0.0.1:1")
    check(done, 2, "expected a new folder", "choose another folder")
    assert {path: path.read_bytes() for path in bare.home.glob("*.*")} == before


def test_a_coordinator_that_is_not_there_is_a_broken_link(bare: Federation, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    for name in ("ca.pem", "admin.pem", "admin.key"):
        write_private(tmp_path / name, (bare.home / name).read_bytes())
    write_private(tmp_path / "admin.toml", f'server = "{address}"\n')
    said = f"cannot reach the coordinator at {address}"
    check(fedge("run", "list", ADMIN, tmp_path / "admin.toml"), 4, said)
    token = bare.authority.issue_token("nobody", now=now())
    arguments = ("--server", address, "--token", token, "--ca", bare.home / "ca.pem", "--dir", tmp_path)
    check(fedge("client", "enrol", *arguments), 4, said)


def test_a_run_that_nobody_knows_is_named(bare: Federation, tmp_path: Path) -> None:
    for command in (("show",), ("stop",), ("export", "--out", tmp_path / "model.safetensors")):
        done = fedge("run", command[0], "no-such-run", *command[1:], ADMIN, bare.admin_toml)
        check(done, 1, "'no-such-run'", "fedge run list")
    assert not (tmp_path / "model.safetensors").exists()


def test_words_that_are_no_command_are_an_error(bare: Federation) -> None:
    for arguments in (("run", "sumbit"), ("server", "init"), ("run", "list"), ("client", "start", "--fast")):
        done = fedge(*arguments)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
