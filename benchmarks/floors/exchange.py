"""D1, D2: a bare round over grpc.aio with mTLS: the bytes go down to all clients and as many come back.

    python -m benchmarks.floors.exchange server DIR --clients N --rounds N --payload BYTES
    python -m benchmarks.floors.exchange client DIR --payload BYTES

DIR holds the certificates (see pki.py). The server binds port 0 and writes it to DIR/port; it ends when
all rounds are done. One bidirectional stream a client; each round the server pushes an order and the
payload to all at once, in messages of at most 1 MiB; a client answers when it has all of it. What arrives
is copied into a buffer that is there from the start; nothing else is done with it. The server prints
{"seconds": [...], "rss_before_bytes": N, "rss_peak_bytes": N}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from benchmarks.measure import forget_peak, memory

ORDER_BYTES = 64
CHUNK_BYTES = 1 << 20
_METHOD = "/benchmark.Exchange/Session"
_JOIN_S = 60.0
_END_OF_STREAM: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it


def chunks_of(size: int) -> list[bytes]:
    """`size` random bytes, in chunks: encoded once and sent as they are."""
    return [os.urandom(min(CHUNK_BYTES, size - start)) for start in range(0, size, CHUNK_BYTES)]


class Server:
    """Waits for its clients, then does the rounds."""

    def __init__(self, *, clients: int, rounds: int, payload: int) -> None:
        self._clients, self._rounds, self._payload = clients, rounds, payload
        self._streams: list[Any] = []
        self._joined, self._over = asyncio.Event(), asyncio.Event()

    async def session(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """One client's stream, open until all rounds are done; `run` reads and writes it."""
        await context.read()  # hello
        self._streams.append(context)
        if len(self._streams) == self._clients:
            self._joined.set()
        await self._over.wait()

    async def run(self) -> dict[str, object]:
        before = memory(os.getpid(), "VmRSS")
        forget_peak(os.getpid())
        down = chunks_of(ORDER_BYTES + self._payload)
        buffers = [bytearray(self._payload) for _ in range(self._clients)]
        await asyncio.wait_for(self._joined.wait(), _JOIN_S)
        seconds = []
        for _ in range(self._rounds):
            began = time.perf_counter()
            both = zip(self._streams, buffers, strict=True)
            await asyncio.gather(*(self._exchange(stream, down, buffer) for stream, buffer in both))
            seconds.append(time.perf_counter() - began)
        self._over.set()
        peak = memory(os.getpid(), "VmHWM")
        return {"seconds": seconds, "rss_before_bytes": before, "rss_peak_bytes": peak}

    async def _exchange(self, stream: Any, down: list[bytes], buffer: bytearray) -> None:
        for chunk in down:
            await stream.write(chunk)
        await receive(stream, memoryview(buffer))


async def receive(stream: Any, buffer: memoryview) -> bool:
    """Fill `buffer` from the stream; False if the stream ended instead."""
    offset = 0
    while offset < len(buffer):
        message = await stream.read()
        if message is _END_OF_STREAM:
            return False
        buffer[offset : offset + len(message)] = message
        offset += len(message)
    return True


async def serve(folder: Path, server: Server) -> dict[str, object]:
    pem = {name: (folder / name).read_bytes() for name in ("ca.pem", "server.pem", "server.key")}
    credentials = grpc.ssl_server_credentials(
        [(pem["server.key"], pem["server.pem"])], root_certificates=pem["ca.pem"], require_client_auth=True
    )
    shell = grpc.aio.server()
    service, method = _METHOD.removeprefix("/").split("/")
    handler: Any = grpc.stream_stream_rpc_method_handler(server.session)
    shell.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = shell.add_secure_port("127.0.0.1:0", credentials)
    await shell.start()
    (folder / "port.new").write_text(str(port))
    (folder / "port.new").replace(folder / "port")
    try:
        return await server.run()
    finally:
        await shell.stop(grace=2.0)


async def take_part(folder: Path, payload: int) -> None:
    """Answer rounds until the server ends the stream."""
    pem = {name: (folder / name).read_bytes() for name in ("ca.pem", "client.pem", "client.key")}
    credentials = grpc.ssl_channel_credentials(pem["ca.pem"], pem["client.key"], pem["client.pem"])
    up, buffer = chunks_of(payload), bytearray(ORDER_BYTES + payload)
    address = f"127.0.0.1:{(folder / 'port').read_text()}"
    async with grpc.aio.secure_channel(address, credentials) as channel:
        shell: Any = channel  # the stubs know neither optional serialisers nor read and write
        call = shell.stream_stream(_METHOD)()
        await call.write(b"hello")
        while await receive(call, memoryview(buffer)):
            for chunk in up:
                await call.write(chunk)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["server", "client"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--payload", type=int, required=True)
    given = parser.parse_args()
    if given.role == "client":
        asyncio.run(take_part(given.folder, given.payload))
        return

    async def run() -> dict[str, object]:
        server = Server(clients=given.clients, rounds=given.rounds, payload=given.payload)
        return await serve(given.folder, server)

    print(json.dumps(asyncio.run(run())))


if __name__ == "__main__":
    main()
