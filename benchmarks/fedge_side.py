"""fedge's side of a deployment: a coordinator and its sites as real processes, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomlkit

from benchmarks.measure import Options, round_seconds, wait_until
from benchmarks.processes import (
    ROOT,
    CrashError,
    check_running,
    free_port,
    listens,
    run_text,
    settle,
    started,
)
from benchmarks.tasks.marks import SUBMITTED, read_marks

FEDGE = str(Path(sys.executable).parent / "fedge")
_COMMAND_S, _CONNECT_S = 60.0, 120.0
_STATUS_EVERY_S = 20.0


def run_toml(
    task: str, *, rounds: int, cohort: int, work: dict[str, Any], strategy: str = "fedavg", **settings: Any
) -> str:
    """A run.toml with evaluation and protection off; `settings` are the strategy's."""
    return tomlkit.dumps(
        {
            "name": task.partition(":")[0].rpartition(".")[2],
            "task": task,
            "rounds": rounds,
            "seed": 7,
            "strategy": {"name": strategy, **settings},
            "work": work,
            "cohort": {"size": cohort, "deadline_s": 300},
            "evaluation": {"every": 0},
            "privacy": {"unit": "none"},
        }
    )


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that is done. `history_seconds` is the coordinator's own time for each round, `period_seconds`
    the time between one training step and the next on a site, which misses nothing between rounds.
    `first_step_s` is from just before the submission to the first step, if the task notes the former."""

    history_seconds: list[float]
    period_seconds: list[float]
    first_step_s: float | None

    def values(self) -> dict[str, float]:
        values = round_seconds(self.history_seconds, self.period_seconds)
        if self.first_step_s is not None:
            values["submit_to_first_step_seconds"] = self.first_step_s
        return values


@dataclass(frozen=True, slots=True)
class Deployment:
    """A coordinator and its sites, each a real process, over mTLS on loopback."""

    folder: Path
    server: subprocess.Popen[bytes]
    agents: list[subprocess.Popen[bytes]]
    processes: dict[Path, subprocess.Popen[bytes]]

    def run(self, run: str, *, rounds: int, deadline_s: float) -> Finished:
        """Submit a run and wait until it is done. Meanwhile nothing else runs: a site's marks are watched,
        and the coordinator is asked only now and then.

        Raises:
            CrashError: the run failed, or one of the processes ended.
        """
        path, marks = self.folder / "run.toml", self.folder / "marks-0"
        submitted = self.folder / "submitted"
        path.write_text(run)
        before = len(read_marks(marks))
        line = run_text(
            [FEDGE, "run", "submit", str(path), *self._admin],
            log=self.folder / "submit.log",
            deadline_s=_COMMAND_S,
            env={SUBMITTED: str(submitted)},
        )
        asked = time.monotonic()

        def trained() -> bool:
            nonlocal asked
            check_running(self.processes)
            if time.monotonic() - asked > _STATUS_EVERY_S:
                self.show(line)
                asked = time.monotonic()
            return marks.exists() and marks.stat().st_size >= 8 * (before + rounds)

        wait_until(trained, deadline_s=deadline_s, every_s=0.1, what=f"{rounds} training steps at a site")
        wait_until(
            lambda: len(self.show(line)["history"]) == rounds,
            deadline_s=deadline_s,
            every_s=1.0,
            what=f"a history of {rounds} rounds",
        )
        steps = read_marks(marks)[before:]
        return Finished(
            [float(row["seconds"]) for row in self.show(line)["history"]],
            [later - earlier for earlier, later in pairwise(steps)],
            steps[0] - read_marks(submitted)[0] if submitted.exists() else None,
        )

    def connected(self) -> bool:
        """Whether every site has a session with the coordinator."""
        check_running(self.processes)
        arguments = [FEDGE, "site", "list", *self._admin, "--json"]
        found = run_text(arguments, log=self.folder / "sites.log", deadline_s=_COMMAND_S)
        return [site["state"] for site in json.loads(found)].count("connected") == len(self.agents)

    def show(self, run_id: str) -> dict[str, Any]:
        """What the coordinator says about a run.

        Raises:
            CrashError: the run has failed or was stopped.
        """
        log = self.folder / "show.log"
        arguments = [FEDGE, "run", "show", run_id, *self._admin, "--json"]
        body: dict[str, Any] = json.loads(run_text(arguments, log=log, deadline_s=_COMMAND_S))
        if body["status"] not in ("running", "done"):
            raise CrashError(
                f"run {run_id} is {body['status']} at round {body['round']}: {body.get('reason')}"
            )
        return body

    @property
    def _admin(self) -> list[str]:
        return ["--admin", str(self.folder / "server" / "admin.toml")]


@contextmanager
def deployment(
    name: str,
    *,
    clients: int,
    options: Options,
    tables: Callable[[int], dict[str, Any]] = lambda index: {},
) -> Iterator[Deployment]:
    """Start a coordinator and `clients` sites, each with one training thread and these `tables` in its client.toml; end
    them all."""
    folder = Path(options.scratch) / f"{name}-{time.monotonic_ns()}"
    folder.mkdir()
    port, home = free_port(), folder / "server"
    address, settings = f"127.0.0.1:{port}", str(home / "server.toml")

    def fedge(*arguments: str) -> str:
        return run_text([FEDGE, *arguments], log=folder / "command.log", deadline_s=_COMMAND_S)

    fedge("server", "init", str(home), "--listen", address)
    with ExitStack() as stack:
        log = folder / "server.log"
        server = stack.enter_context(started([FEDGE, "server", "start", settings], log=log))
        processes = {log: server}

        def ready() -> bool:
            check_running(processes)
            return listens(port)

        wait_until(ready, deadline_s=_COMMAND_S, what="a coordinator that listens")
        agents = []
        for index in range(clients):
            site = folder / f"site-{index}"
            token = fedge("server", "token", settings, "--site", f"site-{index}")
            ca = str(home / "ca.pem")
            fedge("client", "enrol", "--server", address, "--token", token, "--ca", ca, "--dir", str(site))
            _configure(
                site / "client.toml", index=index, marks=folder / f"marks-{index}", tables=tables(index)
            )
            log = folder / f"site-{index}.log"
            arguments = [FEDGE, "client", "start", str(site / "client.toml")]
            agents.append(stack.enter_context(started(arguments, log=log)))
            processes[log] = agents[-1]
        deployed = Deployment(folder, server, agents, processes)
        wait_until(deployed.connected, deadline_s=_CONNECT_S, every_s=1.0, what="sites that are connected")
        settle(1.0 if options.quick else 3.0)
        yield deployed


def _configure(path: Path, *, index: int, marks: Path, tables: dict[str, Any]) -> None:
    """What a site's engineer adds to the client.toml that `enrol` wrote."""
    document = tomlkit.parse(path.read_text())
    document["task"] = {"path": str(ROOT)}
    document["worker"] = {"threads": 1}
    document["data"] = {"index": index, "marks": str(marks)}
    document.update(tables)
    path.write_text(tomlkit.dumps(document))
