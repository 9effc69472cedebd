"""C3: 200 sites deliver 1 MB each at the same moment. The floor is the same over bare grpc.aio, into files.

All of them fetch the model first, and hold their updates back until everybody has it: both halves are
measured. With 1 MB an update is a chunk; only 8 MB (`--large`) tell what is held of an upload from all of it.
"""

from __future__ import annotations

import time

from benchmarks import light
from benchmarks.exchanges import streams
from benchmarks.light import COMMITTED
from benchmarks.measure import (
    FEDGE,
    FLOOR,
    Case,
    Goal,
    Options,
    Outcome,
    Sample,
    Side,
    Spread,
    forget_peak,
    memory,
    wait_until,
)
from benchmarks.processes import settle

_SITES = 200
_BYTES = 1_000_000
_LARGE_BYTES = 8_000_000
_CHUNK_BYTES = 1 << 20
_MODELS = 2.5
_DEADLINE_S = 300.0
_SETTLE_S = 1.0


def cases(options: Options) -> list[Case]:
    sizes = (_BYTES, _LARGE_BYTES) if options.large else (_BYTES,)
    return [_case(payload, options) for payload in sizes]


def _case(payload: int, options: Options) -> Case:
    def floor() -> Sample:
        found = streams(clients=_SITES, payload=payload, options=options)
        connected = found["rss_connected_bytes"]
        fetching, delivering = (found[f"{half}_peak_bytes"] - connected for half in ("fetch", "upload"))
        return _sample(fetching, delivering, found["upload_seconds"])

    def growth(found: Outcome) -> Spread | None:
        return found.spread(FEDGE, "growth_bytes", per=1e6)

    return Case(
        f"C3-{payload // 1_000_000}MB",
        f"{_SITES} sites deliver {payload // 1_000_000} MB at once",
        (Side.of(FLOOR, floor), Side.of(FEDGE, lambda: _deliver(payload, options))),
        (
            Goal(
                "the coordinator's peak beyond itself",
                (_MODELS * payload + _SITES * _BYTES) / 1e6,
                growth,
                "MB",
            ),
        ),
    )


def _deliver(payload: int, options: Options) -> Sample:
    federation = light.federation("c3", sites=_SITES, options=options)
    go = federation.folder / "go"
    with federation.coordinator() as server, federation.connected(server, "--hold", go) as sites:
        settle(_SETTLE_S)
        before = memory(server.pid, "VmRSS")
        forget_peak(server.pid)
        run = light.run_toml("c3", rounds=2, size=_SITES)
        federation.submit(run, elements=payload // 4)
        wait_until(
            lambda: light.count_lines(sites, "holding") >= _SITES,
            deadline_s=_DEADLINE_S,
            what=f"{_SITES} sites that have the model",
        )
        settle(_SETTLE_S)
        fetching = memory(server.pid, "VmHWM") - before
        forget_peak(server.pid)
        began = time.monotonic()
        go.touch()
        server.until(COMMITTED, deadline_s=_DEADLINE_S)
        seconds = time.monotonic() - began
        delivering = memory(server.pid, "VmHWM") - before
    return _sample(fetching, delivering, seconds)


def _sample(fetching: int, delivering: int, seconds: float) -> Sample:
    return Sample(
        {
            "seconds": seconds,
            "growth_bytes": float(max(fetching, delivering)),
            "fetching_growth_bytes": float(fetching),
            "delivering_growth_bytes": float(delivering),
            "each_upload_chunks": delivering / _SITES / _CHUNK_BYTES,
        }
    )
