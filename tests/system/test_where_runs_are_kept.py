"""The store as operators have it: on PostgreSQL, and restored from a copy of its folder."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa
from databases import postgresql
from harness import Federation, Running, coordinator, fedge, fedge_ok, free_port, run_toml, simulated, until

__all__ = ["postgresql"]  # a fixture that a test here asks for

SITES = ["client-0", "client-1"]
OFTEN = "[evaluation]\nevery = 0\n[checkpoint]\nrounds = 1\nseconds = 0\n"


def check(federation: Federation, run_id: str, text: str, *, rounds: int) -> None:
    summary = federation.finish(run_id)
    assert summary.status == "done", summary.reason
    assert [list(row.clients) for row in federation.show(run_id).history] == [SITES] * rounds
    assert federation.digest(run_id) == simulated(text)


def started(federation: Federation) -> None:
    for name in SITES:
        federation.enrol(name)
        federation.start(name)


def test_a_coordinator_on_postgresql_is_killed_and_goes_on(
    tmp_path: Path, postgresql: sa.URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgresql.set(database="postgres").render_as_string(hide_password=False)
    text = run_toml("on-postgresql", rounds=200, more=OFTEN)
    with coordinator(tmp_path, database=url) as federation:
        started(federation)
        armed = federation
        for fault in ("store.commit:3", "store.after:2", "checkpoint.rename:2"):
            armed.server.signal(signal.SIGTERM)
            armed = armed.restarted(fault=fault)
            if fault.startswith("store.commit"):
                until(lambda: armed.connected() == set(SITES), "both are back")
                run_id = armed.submit(text)
            assert armed.server.ends() == -signal.SIGKILL
        last = armed.restarted()
        check(last, run_id, text, rounds=200)
        second = fedge("server", "start", last.home / "server.toml")
        assert second.returncode == 2
        assert "another" in second.stderr


def test_a_copy_of_the_folder_is_a_backup_from_which_runs_go_on(tmp_path: Path) -> None:
    text = run_toml("restored", rounds=6, more=OFTEN)
    with coordinator(tmp_path) as federation:
        started(federation)
        with federation.blocked("client-0"):
            run_id = federation.submit(text)
            federation.at_work("client-0")
            federation.server.signal(signal.SIGTERM)
            shutil.copytree(federation.home, tmp_path / "backup")
        went_on = federation.restarted()
        until(lambda: went_on.show(run_id).summary.round > 2, "the run is further than its backup")
        went_on.server.signal(signal.SIGKILL)
        shutil.rmtree(federation.home)  # the machine is lost
        shutil.copytree(tmp_path / "backup", federation.home)
        check(went_on.restarted(), run_id, text, rounds=6)


def test_a_database_url_is_chosen_when_the_federation_is_made(tmp_path: Path, postgresql: sa.URL) -> None:
    url = postgresql.set(database="postgres").render_as_string(hide_password=False)
    home = tmp_path / "coordinator"
    fedge_ok("server", "init", home, "--listen", f"127.0.0.1:{free_port()}", "--database", url)
    assert url in (home / "server.toml").read_text()
    token = fedge_ok("server", "token", home / "server.toml", "--site", "icu").splitlines()[-1]
    assert token
    server = Running.start("server", "start", home / "server.toml", log=tmp_path / "log")
    try:
        server.says("coordinator ready")
        assert fedge_ok("site", "list", "--json", "--admin", home / "admin.toml").startswith("[")
    finally:
        server.end()
