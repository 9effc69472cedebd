"""C2, C3: many bare grpc.aio streams over mTLS, at rest; and then, if there is a payload, one upload on each.

    python -m benchmarks.floors.streams server DIR --clients N [--payload BYTES] [--idle-s SECONDS]
    python -m benchmarks.floors.streams client DIR --clients N [--payload BYTES]

As exchange.py, whose clients these are, many in a process, each with its own channel. All of them get the
payload first, and then the order at once; what they answer is written to a file each, chunk by chunk. The
server prints a JSON object of seconds and bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.floors.exchange import ORDER_BYTES, Server, chunks_of, serve, take_part
from benchmarks.measure import forget_peak, memory

_POLL_S = 0.005
_SETTLE_S = 1.0
_JOIN_S = 120.0


class Streams(Server):
    """Waits for its clients, rests, and does one round if there is a payload."""

    def __init__(self, *, clients: int, payload: int, idle_s: float, folder: Path) -> None:
        super().__init__(clients=clients, rounds=1, payload=payload)
        self._idle_s = idle_s
        self._folder = folder

    async def run(self) -> dict[str, object]:
        before = memory(os.getpid(), "VmRSS")
        while not self._streams:  # noqa: ASYNC110  # nobody signals the first
            await asyncio.sleep(_POLL_S)
        began = time.perf_counter()
        await asyncio.wait_for(self._joined.wait(), _JOIN_S)
        found: dict[str, object] = {
            "connect_seconds": time.perf_counter() - began,
            "rss_before_bytes": before,
        }
        await asyncio.sleep(_SETTLE_S)
        used = time.process_time()
        await asyncio.sleep(self._idle_s)
        found["idle_cpu_seconds"] = time.process_time() - used
        found["rss_connected_bytes"] = memory(os.getpid(), "VmRSS")
        if self._payload:
            found |= await self._upload()
        self._over.set()
        return found

    async def _upload(self) -> dict[str, object]:
        forget_peak(os.getpid())
        payload, order = chunks_of(self._payload), os.urandom(ORDER_BYTES)
        await asyncio.gather(*(_send(stream, payload) for stream in self._streams))
        await asyncio.sleep(_SETTLE_S)
        found: dict[str, object] = {"fetch_peak_bytes": memory(os.getpid(), "VmHWM")}
        forget_peak(os.getpid())
        began = time.perf_counter()
        await asyncio.gather(*(self._exchange_one(stream, order) for stream in self._streams))
        found["upload_seconds"] = time.perf_counter() - began
        found["upload_peak_bytes"] = memory(os.getpid(), "VmHWM")
        return found

    async def _exchange_one(self, stream: Any, order: bytes) -> None:
        await stream.write(order)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            await _keep(stream, file, self._payload)


async def _send(stream: Any, chunks: list[bytes]) -> None:
    for chunk in chunks:
        await stream.write(chunk)


async def _keep(stream: Any, file: BinaryIO, size: int) -> None:
    while file.tell() < size:
        file.write(await stream.read())


async def take_parts(folder: Path, payload: int, clients: int) -> None:
    await asyncio.gather(*(take_part(folder, payload) for _ in range(clients)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["server", "client"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--payload", type=int, default=0)
    parser.add_argument("--idle-s", type=float, default=0.0)
    given = parser.parse_args()
    if given.role == "client":
        asyncio.run(take_parts(given.folder, given.payload, given.clients))
        return
    clients, payload, idle_s = given.clients, given.payload, given.idle_s

    async def run() -> dict[str, object]:
        server = Streams(clients=clients, payload=payload, idle_s=idle_s, folder=given.folder)
        return await serve(given.folder, server)

    print(json.dumps(asyncio.run(run())))


if __name__ == "__main__":
    main()
