"""The floor of D1 and D2: runs floors/exchange.py as a server and clients, and reads what it prints."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Options, Sample, after_warm_up, wait_until
from benchmarks.pki import write_certificates
from benchmarks.processes import check_running, finish, last_line, module, started

_DEADLINE_S = 600
_START_S = 60


def exchange(*, clients: int, rounds: int, payload: int, options: Options) -> Sample:
    """A bare grpc.aio run: seconds a round without the first, and the server's memory."""
    with TemporaryDirectory(dir=options.scratch) as name, ExitStack() as stack:
        folder = Path(name)
        write_certificates(folder)
        sizes = ("--clients", clients, "--rounds", rounds, "--payload", payload)
        arguments = module("benchmarks.floors.exchange", "server", folder, *sizes)
        log = folder / "server.log"
        server = stack.enter_context(started(arguments, log=log))

        def ready() -> bool:
            check_running({log: server})
            return (folder / "port").exists()

        wait_until(ready, deadline_s=_START_S, what="the port of the floor's server")
        arguments = module("benchmarks.floors.exchange", "client", folder, "--payload", payload)
        for index in range(clients):
            stack.enter_context(started(arguments, log=folder / f"client-{index}.log"))
        finish(server, log=log, deadline_s=_DEADLINE_S)
        found = json.loads(last_line(log))
    return Sample(
        {
            "seconds": after_warm_up(found["seconds"]),
            "server_before_bytes": float(found["rss_before_bytes"]),
            "server_growth_bytes": float(found["rss_peak_bytes"] - found["rss_before_bytes"]),
        },
        rounds=rounds - 1,
    )
