"""A bad link on demand: a TCP proxy in the test's own process that delays, throttles, cuts, swallows and corrupts.

It knows nothing of what passes: TLS goes through untouched. Whatever is set holds from then on for all
connections, those that are open and those to come. It is not a model of a network (nothing is lost or
reordered below TCP): for that, see netns.py.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import functools
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

_PIECE_BYTES = 16 << 10
_BUFFER_BYTES = 256 << 10
"""What one direction of a connection holds here; more is held back at its sender."""
_SLICE_S = 0.02
"""A throttled direction passes as much at once as may pass in this time."""
_DIAL_S = 5.0
_CALL_S = 20.0
_ABRUPTLY = struct.pack("ii", 1, 0)

State = Literal["open", "cut", "blackhole"]
Dial = Callable[[], socket.socket]
Broken = Literal["eof", "reset"]


class Way:
    """One direction of the link. Its rate is shared by all connections; settings hold at once."""

    def __init__(self) -> None:
        self.latency_s = 0.0
        self.bytes_per_s = 0.0
        """0 is no limit."""
        self.taken = 0
        """Bytes that came in, ever; what has not passed of them is on its way, or was cut off."""
        self.passed = 0
        """Bytes that were handed on, ever."""
        self._marked = 0
        self._corrupt_at: int | None = None
        self._stop_at: int | None = None
        self._then: State = "cut"
        self._free_at = 0.0

    def mark(self) -> None:
        """Begin to count `since_mark` at zero."""
        self._marked = self.passed

    @property
    def since_mark(self) -> int:
        return self.passed - self._marked

    def corrupt(self, *, after_bytes: int = 0) -> None:
        """Flip a bit of the byte that follows on the next `after_bytes` ones."""
        self._corrupt_at = self.passed + after_bytes

    @property
    def corrupted(self) -> bool:
        """Whether what was to be corrupted has passed."""
        return self._corrupt_at is None

    def cut_after(self, more_bytes: int) -> None:
        """Cut the link when exactly so many further bytes have passed, and have arrived."""
        self._then, self._stop_at = "cut", self.passed + more_bytes

    def blackhole_after(self, more_bytes: int) -> None:
        """Blackhole the link when exactly so many further bytes have passed, and have arrived."""
        self._then, self._stop_at = "blackhole", self.passed + more_bytes

    def _send(self, sink: socket.socket, data: memoryview) -> int:
        """Hand on what may pass now; how much that was. BlockingIOError if the receiver takes nothing."""
        room = len(data) if self._stop_at is None else min(len(data), self._stop_at - self.passed)
        if self.bytes_per_s:
            room = min(room, max(1, int(self.bytes_per_s * _SLICE_S)))
        piece = bytearray(data[:room])
        flip = None if self._corrupt_at is None else self._corrupt_at - self.passed
        if flip is not None and flip < room:
            piece[flip] ^= 0x10
        sent = sink.send(piece)
        self.passed += sent
        if flip is not None and flip < sent:
            self._corrupt_at = None
        if self.bytes_per_s:
            self._free_at = max(time.monotonic(), self._free_at) + sent / self.bytes_per_s
        return sent

    @property
    def _wait_s(self) -> float:
        """How long nothing more may pass."""
        return self._free_at - time.monotonic() if self.bytes_per_s else 0.0

    @property
    def _at_stop(self) -> bool:
        return self._stop_at is not None and self.passed >= self._stop_at


class _Pump:
    """One direction of one connection: bytes in order, each at its time, at most `_BUFFER_BYTES` of them."""

    def __init__(self, proxy: Proxy, way: Way, source: socket.socket, sink: socket.socket) -> None:
        self._proxy, self._way, self._source, self._sink = proxy, way, source, sink
        self._held: deque[tuple[float, bytes | Broken]] = deque()
        self._held_bytes = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Until the source has ended and all of it is handed on; ConnectionError if either side broke off."""
        reading = asyncio.create_task(self._read())
        try:
            await self._write()
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        item: bytes | Broken = b""
        while not isinstance(item, str):
            while self._held_bytes >= _BUFFER_BYTES:
                await self._change()
            try:
                item = await loop.sock_recv(self._source, _PIECE_BYTES) or "eof"
            except OSError:
                item = "reset"
            if isinstance(item, bytes):
                self._way.taken += len(item)
            self._held.append((time.monotonic() + self._way.latency_s, item))
            self._held_bytes += len(item)
            self._changed.set()

    async def _write(self) -> None:
        while True:
            while not self._held:
                await self._change()
            due, item = self._held[0]
            while (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await self._proxy.passable()  # nor does the end of a connection get through a black hole
            if item == "reset":
                raise ConnectionResetError
            if item == "eof":
                self._sink.shutdown(socket.SHUT_WR)
                return
            assert isinstance(item, bytes)
            await self._hand_on(memoryview(item))
            self._held.popleft()
            self._held_bytes -= len(item)
            self._changed.set()

    async def _hand_on(self, data: memoryview) -> None:
        while data:
            await self._proxy.passable()
            if (wait_s := self._way._wait_s) > 0:
                await asyncio.sleep(min(wait_s, _SLICE_S))  # the rate may be another by then
                continue
            # From `passable` to here nothing has been waited for: the link is still open.
            try:
                data = data[self._way._send(self._sink, data) :]
            except BlockingIOError:
                await _writable(self._sink)
            if self._way._at_stop:
                await self._proxy.stop_at(self._way, self._sink)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Proxy:
    """The link. Its controls may be called on any thread, and hold when they return."""

    def __init__(self, dial: Dial) -> None:
        self.up = Way()
        """From those who connect (sites) to where they are led (the coordinator)."""
        self.down = Way()
        self.connections = 0
        """How many there were, those that came while the link was cut included."""
        self._dial = dial
        self._state: State = "open"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._stopped = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self._defect: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"proxy {self.address}")

    @property
    def ways(self) -> tuple[Way, Way]:
        return self.up, self.down

    @property
    def state(self) -> State:
        return self._state

    def cut(self) -> None:
        """Reset all connections, and every new one, until `mend`."""
        self._control("cut")

    def blackhole(self) -> None:
        """Pass nothing on, not even the end of a connection, until `mend`: what a pulled cable looks like.

        Nothing is lost: connections that both sides have kept go on.
        """
        self._control("blackhole")

    def mend(self) -> None:
        """Let everything pass again."""
        self._control("open")

    def _control(self, state: State) -> None:
        async def control() -> None:
            self._enter(state)
            if state == "cut":
                await self._reset_all()

        asyncio.run_coroutine_threadsafe(control(), self._loop).result(_CALL_S)

    def _enter(self, state: State) -> None:
        self._state = state
        if state == "open":
            self._open.set()
        else:
            self._open.clear()

    async def passable(self) -> None:
        """Wait until the link is open."""
        while self._state != "open":
            await self._open.wait()

    async def stop_at(self, way: Way, sink: socket.socket) -> None:
        """What was asked for has passed: nothing else does, and once it has arrived the link breaks."""
        way._stop_at = None
        self._enter("blackhole")
        deadline = time.monotonic() + _DIAL_S
        while _not_arrived(sink) and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        if way._then == "cut" and self._state == "blackhole":
            self._enter("cut")
            for task in self._serving:  # and so this one
                task.cancel()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End with all connections reset, and every thread, task and socket gone."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(_CALL_S)
        if self._thread.is_alive():
            raise AssertionError("expected the proxy to end, found it at work")
        if self._defect is not None:
            raise self._defect

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve_all())

    async def _serve_all(self) -> None:
        self._loop.add_reader(self._listener, self._accept)
        await self._stopped.wait()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        await self._reset_all()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            site, _ = self._listener.accept()
            self.connections += 1
            task = self._loop.create_task(self._serve(site))
            self._serving.add(task)
            task.add_done_callback(functools.partial(self._served, site))

    async def _serve(self, site: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            if self._state == "cut":
                return
            await self.passable()
            try:
                coordinator = await self._connect()
            except OSError:  # nobody is there: whoever connected here finds that, too
                return
            stack.callback(_reset, coordinator)
            for end in (site, coordinator):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(_Pump(self, self.up, site, coordinator).run())
                    both.create_task(_Pump(self, self.down, coordinator, site).run())
            except* OSError:  # one side broke off: so does the other
                pass
            else:
                site.close()
                coordinator.close()

    async def _connect(self) -> socket.socket:
        dialling = self._loop.run_in_executor(None, self._dial)
        try:
            return await asyncio.shield(dialling)
        except asyncio.CancelledError:
            dialling.add_done_callback(_hang_up)
            raise

    def _served(self, site: socket.socket, task: asyncio.Task[None]) -> None:
        _reset(site)  # here rather than in a task that may be cancelled before it begins
        self._serving.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._defect = task.exception()

    async def _reset_all(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


@contextlib.contextmanager
def proxied(upstream: str | Dial) -> Iterator[Proxy]:
    """A link to HOST:PORT, or to whatever a function connects to, under an address of its own on loopback."""
    proxy = Proxy(_dialler(upstream) if isinstance(upstream, str) else upstream)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def _dialler(address: str) -> Dial:
    host, _, port = address.rpartition(":")
    return lambda: socket.create_connection((host, int(port)), timeout=_DIAL_S)


def _reset(end: socket.socket) -> None:
    """Break a connection off, unless it has been closed well."""
    if end.fileno() >= 0:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPTLY)
        end.close()


def _hang_up(dialling: asyncio.Future[socket.socket]) -> None:
    if dialling.exception() is None:
        dialling.result().close()


def _not_arrived(end: socket.socket) -> int:
    """Bytes of a connection that its other side has not acknowledged."""
    pending = array.array("i", [0])
    try:
        fcntl.ioctl(end, termios.TIOCOUTQ, pending)
    except OSError:
        return 0
    return pending[0]


async def _writable(end: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(end, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(end)
