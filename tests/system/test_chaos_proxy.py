"""The bad link that the other tests here are made over: it does what it is told to, and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from authorities import new_authority
from chaos import Proxy, proxied
from harness import until

PATIENCE_S = 20.0
SOME = os.urandom(300_000)


@dataclass
class Upstream:
    """Echoes each connection, or keeps what it sends, or reads nothing of it."""

    listener: socket.socket
    echo: bool = True
    reading: threading.Event = field(default_factory=threading.Event)
    received: list[bytearray] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return "{}:{}".format(*self.listener.getsockname())

    def serve(self) -> None:
        handlers = []
        while True:
            try:
                end, _ = self.listener.accept()
            except OSError:
                break
            handlers.append(threading.Thread(target=self._handle, args=(end,)))
            handlers[-1].start()
        for handler in handlers:
            handler.join(PATIENCE_S)

    def _handle(self, end: socket.socket) -> None:
        kept = bytearray()
        self.received.append(kept)
        with end:
            try:
                while self.reading.wait(PATIENCE_S) and (data := end.recv(1 << 16)):
                    kept += data
                    if self.echo:
                        end.sendall(data)
                self.ends.append("eof")
            except OSError:
                self.ends.append("reset")


@contextlib.contextmanager
def upstream(*, echo: bool = True, reading: bool = True) -> Iterator[Upstream]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Upstream(listener, echo)
        if reading:
            server.reading.set()
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.reading.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE_S)


@contextlib.contextmanager
def link(*, echo: bool = True, reading: bool = True) -> Iterator[tuple[Upstream, Proxy]]:
    with upstream(echo=echo, reading=reading) as server, proxied(server.address) as proxy:
        yield server, proxy


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def receive(end: socket.socket, count: int) -> bytes:
    """Exactly so many bytes, or what there is until the end."""
    data = bytearray()
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return bytes(data)


def is_refused(proxy: Proxy) -> bool:
    """Whether a new connection is reset, be it while it is made or after."""
    try:
        with connect(proxy) as end:
            return is_reset(end)
    except ConnectionResetError:
        return True


def is_reset(end: socket.socket) -> bool:
    try:
        while end.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return False


@contextlib.contextmanager
def sending(end: socket.socket, data: bytes) -> Iterator[None]:
    """Send in the background; that the link breaks meanwhile is no failure."""

    def send() -> None:
        with contextlib.suppress(OSError):
            end.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


@pytest.mark.parametrize("latency_s", [0.0, 0.02])
@pytest.mark.parametrize("bytes_per_s", [0.0, 3e6])
def test_what_goes_in_comes_out_unchanged_and_is_counted(latency_s: float, bytes_per_s: float) -> None:
    with link() as (_, proxy), connect(proxy) as end, sending(end, SOME):
        for way in proxy.ways:
            way.latency_s, way.bytes_per_s = latency_s, bytes_per_s
        assert receive(end, len(SOME)) == SOME
        until(lambda: proxy.up.passed == proxy.down.passed == len(SOME), "all of it is counted, once")


def test_connections_do_not_mix() -> None:
    with link() as (_, proxy), contextlib.ExitStack() as stack:
        ends = [stack.enter_context(connect(proxy)) for _ in range(8)]
        for number, end in enumerate(ends):
            stack.enter_context(sending(end, bytes([number]) * 50_000))
        for number, end in enumerate(ends):
            assert receive(end, 50_000) == bytes([number]) * 50_000
        assert proxy.connections == 8


def test_an_end_is_passed_on_behind_what_came_before_it_and_the_other_way_stays_open() -> None:
    with link() as (server, proxy), connect(proxy) as end:
        proxy.down.latency_s = 0.05
        end.sendall(SOME[:1000])
        end.shutdown(socket.SHUT_WR)
        assert receive(end, 2000) == SOME[:1000]
        until(lambda: server.ends == ["eof"], "the end is passed on")


def test_a_reset_of_one_side_is_passed_on_to_the_other() -> None:
    with link() as (server, proxy):
        end = connect(proxy)
        end.sendall(b"x")
        receive(end, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        end.close()
        until(lambda: server.ends == ["reset"], "the reset is passed on")


def test_where_nobody_listens_a_connection_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = "{}:{}".format(*gone.getsockname())
    with proxied(address) as proxy:
        assert is_refused(proxy)


def test_a_throttled_way_falls_far_behind_the_other_and_all_its_connections_share_its_rate() -> None:
    """Progress is compared, not clocks: the slow way is at a fraction when the fast one is done."""
    with link(echo=False) as (_, slow), link(echo=False) as (_, fast), contextlib.ExitStack() as stack:
        slow.up.bytes_per_s = 200_000
        for proxy in (slow, slow, fast):
            end = stack.enter_context(connect(proxy))
            stack.enter_context(sending(end, bytes(4 << 20)))
        until(lambda: fast.up.passed == 4 << 20, "the fast one is done")
        assert slow.up.passed < 2 << 20
        slow.up.bytes_per_s = 0
        until(lambda: slow.up.passed == 8 << 20, "without its throttle the slow one is done, too")


def test_latency_keeps_the_order_even_when_it_ends() -> None:
    with link(echo=False) as (server, proxy), connect(proxy) as end, connect(proxy) as other:
        proxy.up.latency_s = 3600.0
        end.sendall(SOME[:1000])
        until(lambda: proxy.up.taken == 1000, "the first bytes are on their way")
        proxy.up.latency_s = 0.0
        end.sendall(SOME[1000:2000])
        until(lambda: proxy.up.taken == 2000, "all are on their way")
        other.sendall(b"hello")
        until(lambda: b"hello" in server.received, "what comes later passes at once, elsewhere")
        assert proxy.up.passed == 5, "and here nothing overtakes what is delayed"


def test_what_the_receiver_does_not_take_is_held_back_at_the_sender() -> None:
    with link(echo=False, reading=False) as (server, proxy), connect(proxy) as end:
        end.settimeout(1.0)
        sent, piece = 0, bytes(1 << 16)
        with contextlib.suppress(TimeoutError):
            while sent < 256 << 20:
                sent += end.send(piece)
        assert sent < 64 << 20
        server.reading.set()
        end.settimeout(PATIENCE_S)
        end.shutdown(socket.SHUT_WR)
        until(lambda: server.ends == ["eof"], "the receiver has read on")
        assert sum(map(len, server.received)) == sent == proxy.up.passed


@pytest.mark.parametrize("after", [0, 1, 16_384, 123_457])
def test_a_cut_is_exact_and_loses_nothing_that_counts_as_passed(after: int) -> None:
    with link(echo=False) as (server, proxy), connect(proxy) as end:
        end.sendall(b"before")
        until(lambda: proxy.up.passed == 6, "the first bytes have passed")
        proxy.up.mark()
        proxy.up.cut_after(after)
        with sending(end, SOME):
            until(lambda: proxy.state == "cut", "the link is cut")
            assert is_reset(end)
        until(lambda: server.ends == ["reset"], "the other side was reset, too")
        assert proxy.up.since_mark == after
        assert bytes(server.received[0]) == b"before" + SOME[:after]


def test_a_cut_link_resets_whoever_comes_until_it_is_mended() -> None:
    with link() as (server, proxy):
        first = connect(proxy)
        first.sendall(b"x")
        receive(first, 1)
        proxy.cut()
        with first:
            assert is_reset(first)
        assert is_refused(proxy)
        proxy.mend()
        with connect(proxy) as third:
            third.sendall(b"y")
            assert receive(third, 1) == b"y"
        assert [bytes(kept) for kept in server.received] == [b"x", b"y"]
        assert proxy.connections == 3


def test_in_a_black_hole_nothing_passes_and_when_it_is_mended_everything_goes_on() -> None:
    with link() as (server, proxy), connect(proxy) as end:
        proxy.up.blackhole_after(1000)
        with sending(end, SOME):
            until(lambda: proxy.state == "blackhole", "nothing passes any more")
            assert proxy.up.passed == 1000
            proxy.mend()
            assert receive(end, len(SOME)) == SOME
            proxy.blackhole()
        with connect(proxy) as late:
            late.sendall(b"hello")
            until(lambda: len(server.received) == 1, "the newcomer has not got through")
            assert not server.ends, "nor has the end of the other"
            proxy.mend()
            assert receive(late, 5) == b"hello"
        until(lambda: len(server.ends) == 2, "the ends are passed on")


@pytest.mark.parametrize("way", ["up", "down"])
def test_corruption_is_one_bit_at_the_place_that_was_asked_for(way: str) -> None:
    with link() as (_, proxy), connect(proxy) as end:
        getattr(proxy, way).corrupt(after_bytes=200_000)
        with sending(end, SOME):
            data = receive(end, len(SOME))
        until(lambda: getattr(proxy, way).corrupted, "what was to be corrupted has passed")
    wrong = [place for place in range(len(SOME)) if data[place] != SOME[place]]
    assert wrong == [200_000]
    assert (data[200_000] ^ SOME[200_000]).bit_count() == 1


def test_tls_passes_untouched_and_notices_a_flipped_bit(tmp_path: Path) -> None:
    authority, _ = new_authority(tmp_path / "authority", now=datetime.now(UTC))
    credential = authority.server_credential(now=datetime.now(UTC))
    pem = tmp_path / "server.pem"
    pem.write_bytes(credential.key_pem + credential.certificate_pem)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(pem)
    trusting = ssl.create_default_context(cadata=authority.ca_pem.decode())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        noticed: list[ssl.SSLError] = []

        def serve() -> None:
            end, _ = listener.accept()
            with serving.wrap_socket(end, server_side=True) as safe:
                safe.sendall(safe.recv(100))
                try:
                    safe.recv(100)
                except ssl.SSLError as error:
                    noticed.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            proxied("{}:{}".format(*listener.getsockname())) as proxy,
            trusting.wrap_socket(connect(proxy), server_hostname="localhost") as safe,
        ):
            safe.sendall(b"secret")
            assert receive(safe, 6) == b"secret"
            proxy.up.corrupt(after_bytes=10)
            safe.sendall(b"another secret")
            thread.join(PATIENCE_S)
    assert [error.reason for error in noticed] == ["DECRYPTION_FAILED_OR_BAD_RECORD_MAC"]


def test_no_thread_and_no_socket_is_left_whatever_was_under_way() -> None:
    def sockets() -> set[str]:
        """Those of this process, where that can be seen."""
        found = set()
        for descriptor in Path("/proc/self/fd").glob("*"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(str(descriptor.readlink()))
        return {target for target in found if target.startswith("socket")}

    with upstream(reading=False) as server:
        threads = set(threading.enumerate())
        ends = [socket.socket() for _ in range(3)]
        before = sockets()
        with proxied(server.address) as proxy:
            host, _, port = proxy.address.rpartition(":")
            proxy.down.latency_s = 3600.0
            for end in ends[:2]:
                end.connect((host, int(port)))
                end.sendall(SOME)
            until(lambda: len(server.received) == 2, "both have got through")
            proxy.blackhole()
            ends[2].connect((host, int(port)))
            assert len(set(threading.enumerate()) - threads) > 0
        left = set(threading.enumerate()) - threads
        assert not [thread for thread in left if "proxy" in thread.name or "asyncio" in thread.name]
        server.reading.set()
        until(lambda: len(server.ends) == 2, "both connections were reset")
        until(lambda: sockets() <= before, "every socket is closed")
        for end in ends:
            end.close()
