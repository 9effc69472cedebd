"""Five hundred rounds leave nothing behind: neither memory, nor descriptors, nor files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import Federation, coordinator, run_toml, until

SITES = ["client-0", "client-1"]
SLACK_BYTES = 2 << 20
"""Rows of history, and what an allocator does."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with coordinator(tmp_path_factory.mktemp("soak")) as started:
        for name in SITES:
            started.enrol(name)
            started.start(name)
        yield started


def at_rest(federation: Federation) -> dict[str, tuple[int, int]]:
    """Resident bytes and open descriptors of the coordinator and each agent."""
    processes = {"coordinator": federation.server.pid} | {
        name: federation.clients[name].pid for name in SITES
    }
    taken = {}
    for name, pid in processes.items():
        process = psutil.Process(pid)
        taken[name] = process.memory_info().rss, process.num_fds()
    return taken


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tiny:task", "wide:task"])
def test_five_hundred_rounds_leave_nothing_behind(federation: Federation, task: str) -> None:
    often = "[checkpoint]\nrounds = 1\nseconds = 0\n[evaluation]\nevery = 50\n"
    name = task.partition(":")[0]
    federation.run(run_toml(f"{name}-warm-up", task=task, rounds=150, more=often))
    before = at_rest(federation)
    run_id = federation.submit(run_toml(f"{name}-soak", task=task, rounds=500, more=often))
    assert federation.finish(run_id).status == "done"
    for site in SITES:
        until(lambda site=site: f"run_ended run={run_id}" in federation.clients[site].output, "it is told")
        until(lambda site=site: files(federation.folder / site / "outbox", "*") == [], "it has tidied up")
    after = at_rest(federation)
    for process, (resident, descriptors) in after.items():
        assert resident <= before[process][0] + SLACK_BYTES, process
        assert descriptors <= before[process][1], process
    state = federation.home / "state"
    assert len(files(state / "checkpoints" / run_id, "*")) <= 2
    assert sum(path.stat().st_size for path in files(state, "fedge.db*")) < 16 << 20
    assert files(federation.home / "spool", "*") == []
