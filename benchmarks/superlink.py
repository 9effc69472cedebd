"""Flower's own deployment: a SuperLink and SuperNodes, as their manual starts them, without TLS."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, forget_peak, memory, wait_until
from benchmarks.processes import check_running, free_port, listens, run_text, settle, started

_START_S, _COMMAND_S = 120.0, 120.0


@dataclass(frozen=True, slots=True)
class Superlink:
    """What runs, and where `flwr run` finds it."""

    folder: Path
    environment: dict[str, str]
    pid: int
    processes: dict[Path, Any]

    def run(self, app: Path, settings: dict[str, Any], report: Path, *, deadline_s: float) -> dict[str, Any]:
        """Submit an app and wait for its report; `wall_seconds` and `server_growth_bytes` are ours.

        Raises:
            CrashError: one of the processes ended, or it takes too long.
        """
        report.unlink(missing_ok=True)
        folder = self.folder / "app"
        if not folder.exists():  # it writes into it
            shutil.copytree(app, folder)
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        forget_peak(self.pid)
        before, began = memory(self.pid, "VmRSS"), time.monotonic()
        run_text(
            [_tool("flwr"), "run", str(folder), "local", "--run-config", pairs],
            log=self.folder / "run.log",
            deadline_s=_COMMAND_S,
            env=self.environment,
        )

        def reported() -> bool:
            check_running(self.processes)
            return report.exists() and report.stat().st_size > 0

        wait_until(reported, deadline_s=deadline_s, every_s=0.1, what="the app's report")
        told: dict[str, Any] = json.loads(report.read_text())
        return told | {
            "wall_seconds": time.monotonic() - began,
            "server_growth_bytes": memory(self.pid, "VmHWM") - before,
        }


@contextmanager
def superlink(*, clients: int, options: Options) -> Iterator[Superlink]:
    """Start a SuperLink and its SuperNodes, and wait until it knows them; end them all."""
    folder = Path(options.scratch) / f"superlink-{time.monotonic_ns()}"
    (folder / "home").mkdir(parents=True)
    port = free_port()
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # it looks for its own programs
    environment = {"FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}
    (folder / "home/config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with ExitStack() as stack:
        log = folder / "superlink.log"
        arguments = ["--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1"]
        server = stack.enter_context(
            started([_tool("flower-superlink"), *arguments, "--port", str(port)], log=log, env=environment)
        )
        processes = {log: server}

        def ready() -> bool:
            check_running(processes)
            return listens(port)

        wait_until(ready, deadline_s=_START_S, what="a SuperLink that listens")
        for index in range(clients):
            node = folder / f"node-{index}.log"
            config = f"partition-id={index} num-partitions={clients}"
            its = ["--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"]
            its += ["--port", str(free_port()), "--node-config", config]
            processes[node] = stack.enter_context(
                started([_tool("flower-supernode"), *its], log=node, env=environment)
            )

        def known() -> bool:
            check_running(processes)
            return log.read_text(errors="replace").count("Activated node_id") >= clients

        wait_until(known, deadline_s=_START_S, every_s=0.2, what="SuperNodes that are known")
        settle(3.0)
        yield Superlink(folder, environment, server.pid, processes)


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
