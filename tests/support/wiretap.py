"""What a site sends, in clear: a proxy that ends TLS with the coordinator's own key and dials on with the site's.

Everything that goes up is kept, and read as HTTP/2 frames and gRPC messages. Only a test has both keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedge.wire import fedge_pb2 as pb

_PIECE = 1 << 16
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _PADDED = 0, 8


@dataclass
class Wiretap:
    """Listens on `address`; `taken` is what came from sites, connection by connection."""

    address: str
    taken: list[bytearray] = field(default_factory=list)

    @property
    def everything(self) -> bytes:
        return b"".join(bytes(each) for each in self.taken)

    def messages(self) -> list[pb.ClientMessage]:
        """All messages of all sessions."""
        out = []
        for body in self._bodies():
            parts = list(_grpc_messages(body))
            if parts and (first := _parsed(parts[0])) is not None and first.WhichOneof("kind") == "hello":
                out += [message for part in parts if (message := _parsed(part)) is not None]
        return out

    def updates(self, run_id: str) -> list[pb.Update]:
        """The updates of a run that went up within a session."""
        return [each.update for each in self.messages() if each.update.run_id == run_id]

    def _bodies(self) -> Iterator[bytes]:
        """The body of each call."""
        for connection in self.taken:
            bodies: dict[int, bytearray] = {}
            for stream, data in _data_frames(bytes(connection)):
                bodies.setdefault(stream, bytearray()).extend(data)
            yield from map(bytes, bodies.values())


def _parsed(data: bytes) -> pb.ClientMessage | None:
    try:
        return pb.ClientMessage.FromString(data)
    except Exception:
        return None


def _data_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    if not data.startswith(_PREFACE):
        return
    at = len(_PREFACE)
    while at + 9 <= len(data):
        length = int.from_bytes(data[at : at + 3], "big")
        kind, flags = data[at + 3], data[at + 4]
        stream = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
        body = data[at + 9 : at + 9 + length]
        at += 9 + length
        if kind == _DATA:
            yield stream, body[1 : len(body) - body[0]] if flags & _PADDED else body


def _grpc_messages(body: bytes) -> Iterator[bytes]:
    at = 0
    while at + 5 <= len(body):
        compressed, length = struct.unpack_from(">BI", body, at)
        assert not compressed, "nothing here asks for compression"
        if at + 5 + length > len(body):
            return
        yield body[at + 5 : at + 5 + length]
        at += 5 + length


@contextlib.contextmanager
def wiretap(coordinator: str, *, home: Path, site: Path) -> Iterator[Wiretap]:
    """Between a site and its coordinator, from the folders of both, which have their keys."""
    host, _, port = coordinator.rpartition(":")
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(home / "server.pem", home / "server.key")
    inside.set_alpn_protocols(["h2"])
    inside.verify_mode = ssl.CERT_REQUIRED
    inside.load_verify_locations(site / "ca.pem")
    outside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outside.load_verify_locations(site / "ca.pem")
    outside.load_cert_chain(site / "client.pem", site / "client.key")
    outside.set_alpn_protocols(["h2"])
    tap = Wiretap("")
    loop = asyncio.new_event_loop()

    async def connected(near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        taken = bytearray()
        tap.taken.append(taken)
        with contextlib.suppress(asyncio.CancelledError):
            far, forth = await asyncio.open_connection(host, int(port), ssl=outside)
            await asyncio.gather(pump(near, forth, taken), pump(far, back, None), return_exceptions=True)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, taken: bytearray | None) -> None:
        try:
            while data := await source.read(_PIECE):
                if taken is not None:
                    taken.extend(data)
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0, ssl=inside))
    tap.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="wiretap")
    thread.start()
    try:
        yield tap
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()
