"""Two hosts on this machine, and a link between them that is as bad as one likes: delay, loss, rate, cuts.

Two network namespaces, each with a TUN device; the packets between the two pass through this process, which
does to them what `tc netem` would. So it works where the kernel has no netem; it needs root, `ip` and TUN. In contrast
to chaos.py what is lost here is packets, below TCP.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import secrets
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")

NAMESPACES = Path("/var/run/netns")
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_QUEUE = 1000
"""Packets that wait on the link in one direction, as many as netem holds by default; further ones are dropped."""
_MTU = 1500
_POLL_S = 0.05


def why_not() -> str:
    """What is missing here; empty if nothing is."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip`: install iproute2"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    name = f"fedge{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"namespaces cannot be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass(frozen=True)
class Quality:
    """How good the link is in each direction. A rate of 0 is no limit."""

    delay_s: float = 0.0
    loss: float = 0.0
    bits_per_s: float = 0.0


class Host:
    """One end: a namespace of its own."""

    def __init__(self, name: str, address: str, peer: str) -> None:
        self.name = name
        self.address = address
        _run("ip", "netns", "add", name)
        try:
            self.tun = self.inside(_open_tun)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "addr", "add", address, "peer", peer, "dev", "tun0")
            _run("ip", "-n", name, "link", "set", "tun0", "up", "mtu", str(_MTU))
        except BaseException:
            _run("ip", "netns", "del", name)
            raise

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put in front of a command for it to run on this host."""
        return ("ip", "netns", "exec", self.name)

    def dial(self, port: int) -> socket.socket:
        """A connection to a server on this host, opened on this host."""
        return self.inside(lambda: socket.create_connection((self.address, port), timeout=20))

    def inside(self, function: Callable[[], R]) -> R:
        """What a function returns that is called in this namespace; file descriptors stay in it."""
        outcome: list[R] = []
        trouble: list[BaseException] = []

        def enter() -> None:
            try:
                with (NAMESPACES / self.name).open("rb") as namespace:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                outcome.append(function())
            except BaseException as error:
                trouble.append(error)

        thread = threading.Thread(target=enter)  # a thread's namespace ends with it
        thread.start()
        thread.join()
        if trouble:
            raise trouble[0]
        return outcome[0]

    def close(self) -> None:
        os.close(self.tun)
        _run("ip", "netns", "del", self.name)


class Network:
    """Two hosts, and the process between them."""

    def __init__(self, *, seed: int = 7) -> None:
        tag = secrets.token_hex(3)
        with contextlib.ExitStack() as made:
            self.server = Host(f"fedge{tag}s", "192.0.2.1", "192.0.2.2")
            made.callback(self.server.close)
            self.site = Host(f"fedge{tag}c", "192.0.2.2", "192.0.2.1")
            made.pop_all()
        self.quality = Quality()
        self.down = False
        self.offered = {"up": 0, "down": 0}
        """Packets that either end has sent, whatever becomes of them."""
        self.carried = {"up": 0, "down": 0}
        """Bytes of packets that have passed, with their headers."""
        self._on_the_way = {"up": 0, "down": 0}
        self._cuts = 0
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="link", daemon=True)
        self._thread.start()

    def shape(self, quality: Quality) -> None:
        """How good the link is from now on."""
        self.quality = quality

    def cut(self) -> None:
        """Nothing passes any more, what is on the link is lost, and neither end is told."""
        self.down = True
        self._cuts += 1

    def mend(self) -> None:
        self.down = False

    @property
    def waiting(self) -> int:
        """Packets that are on the link."""
        return sum(self._on_the_way.values())

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for host in (self.server, self.site):
            host.close()

    def _carry(self) -> None:
        ways = {self.site.tun: (self.server.tun, "up"), self.server.tun: (self.site.tun, "down")}
        free_at = {"up": 0.0, "down": 0.0}
        queue: list[tuple[float, int, str, int, bytes]] = []
        numbers = count()
        cuts = 0
        while not self._over.is_set():
            wait_s = min(_POLL_S, max(0.0, queue[0][0] - time.monotonic())) if queue else _POLL_S
            readable, _, _ = select.select(list(ways), [], [], wait_s)
            now = time.monotonic()
            if cuts != self._cuts:
                cuts = self._cuts
                queue.clear()
                self._on_the_way.update(up=0, down=0)
                free_at.update(up=now, down=now)
            for source in readable:
                packet = os.read(source, _MTU + 64)
                sink, way = ways[source]
                quality = self.quality
                self.offered[way] += 1
                if self.down or self._random.random() < quality.loss or self._on_the_way[way] >= _QUEUE:
                    continue
                takes_s = 8 * len(packet) / quality.bits_per_s if quality.bits_per_s else 0.0
                free_at[way] = max(free_at[way], now) + takes_s
                self._on_the_way[way] += 1
                heapq.heappush(queue, (free_at[way] + quality.delay_s, next(numbers), way, sink, packet))
            while queue and queue[0][0] <= time.monotonic():
                _, _, way, sink, packet = heapq.heappop(queue)
                self._on_the_way[way] -= 1
                self.carried[way] += len(packet)
                with contextlib.suppress(OSError):  # the device is full: the packet is lost
                    os.write(sink, packet)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Two hosts with a good link; both are gone afterwards."""
    net = Network()
    try:
        yield net
    finally:
        net.close()


def _open_tun() -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
