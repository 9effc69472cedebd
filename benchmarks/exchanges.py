"""The floors over bare gRPC: D1's and D2's is floors/exchange.py, C2's and C3's floors/streams.py. Runs a
server and clients, and reads what the server prints."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import Options, Sample, after_warm_up, wait_until
from benchmarks.pki import write_certificates
from benchmarks.processes import check_running, finish, last_line, module, started

_DEADLINE_S = 600
_START_S = 60


def exchange(*, clients: int, rounds: int, payload: int, options: Options) -> Sample:
    """A bare grpc.aio run: seconds a round without the first, and the server's memory."""
    sizes = ("--clients", clients, "--rounds", rounds, "--payload", payload)
    client = ("--payload", payload)
    found = _floor("exchange", server=sizes, client=client, processes=clients, options=options)
    return Sample(
        {
            "seconds": after_warm_up(found["seconds"]),
            "server_before_bytes": float(found["rss_before_bytes"]),
            "server_growth_bytes": float(found["rss_peak_bytes"] - found["rss_before_bytes"]),
        },
        rounds=rounds - 1,
    )


def streams(*, clients: int, options: Options, payload: int = 0, idle_s: float = 0.0) -> dict[str, Any]:
    """Bare grpc.aio streams, those of 2 processes of clients: what floors/streams.py prints."""
    sizes = ("--clients", clients, "--payload", payload, "--idle-s", idle_s)
    client = ("--clients", clients // 2, "--payload", payload)
    return _floor("streams", server=sizes, client=client, processes=2, options=options)


def _floor(
    program: str, *, server: tuple[object, ...], client: tuple[object, ...], processes: int, options: Options
) -> dict[str, Any]:
    """Run a floor's server, and its clients in so many processes; what the server printed."""
    with TemporaryDirectory(dir=options.scratch) as name, ExitStack() as stack:
        folder = Path(name)
        write_certificates(folder)
        program = f"benchmarks.floors.{program}"
        log = folder / "server.log"
        running = stack.enter_context(started(module(program, "server", folder, *server), log=log))

        def ready() -> bool:
            check_running({log: running})
            return (folder / "port").exists()

        wait_until(ready, deadline_s=_START_S, what="the port of the floor's server")
        arguments = module(program, "client", folder, *client)
        for index in range(processes):
            stack.enter_context(started(arguments, log=folder / f"client-{index}.log"))
        finish(running, log=log, deadline_s=_DEADLINE_S)
        found: dict[str, Any] = json.loads(last_line(log))
        return found
