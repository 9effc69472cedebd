"""The link between two hosts that `test_netem.py` runs over: it does to packets what it is told to."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import netns
import pytest
from harness import until
from netns import Network, Quality, network

WHY_NOT = netns.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
PATIENCE_S = 20.0
SOME = os.urandom(300_000)
NEVER = 3600.0


@dataclass(frozen=True)
class Post:
    """Datagrams from the site to the server."""

    net: Network
    sender: socket.socket
    receiver: socket.socket

    def send(self, data: bytes) -> None:
        """Send one, and see it reach the link."""
        offered = self.net.offered["up"]
        self.sender.send(data)
        until(lambda: self.net.offered["up"] > offered, "the packet is on the link")

    def pending(self) -> int:
        """How many have arrived."""
        found = 0
        while select.select([self.receiver], [], [], 0)[0]:
            self.receiver.recv(2000)
            found += 1
        return found


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with network() as net:
        yield net


@pytest.fixture
def net(hosts: Network) -> Iterator[Network]:
    yield hosts
    hosts.cut()  # and nothing is left of what is on it
    hosts.shape(Quality())
    until(lambda: not hosts.waiting, "the link is empty")
    hosts.mend()


@pytest.fixture
def post(net: Network) -> Iterator[Post]:
    def udp() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with net.server.inside(udp) as receiver, net.site.inside(udp) as sender:
        receiver.settimeout(PATIENCE_S)
        receiver.bind((net.server.address, 0))
        sender.connect(receiver.getsockname())
        sender.send(b"hello")
        assert receiver.recv(100) == b"hello"
        yield Post(net, sender, receiver)


@pytest.mark.parametrize("quality", [Quality(), Quality(delay_s=0.005), Quality(loss=0.05)], ids=repr)
def test_a_stream_comes_out_unchanged_whatever_becomes_of_its_packets(net: Network, quality: Quality) -> None:
    listener = net.server.inside(lambda: socket.create_server((net.server.address, 0)))

    def echo() -> None:
        end, _ = listener.accept()
        with end:
            while data := end.recv(1 << 16):
                end.sendall(data)

    def send(end: socket.socket) -> None:
        end.sendall(SOME)
        end.shutdown(socket.SHUT_WR)

    net.shape(quality)
    before = dict(net.carried)
    with listener:
        thread = threading.Thread(target=echo)
        thread.start()
        address = listener.getsockname()
        with net.site.inside(lambda: socket.create_connection(address, timeout=PATIENCE_S)) as end:
            sending = threading.Thread(target=send, args=(end,))
            sending.start()
            data = bytearray()
            while more := end.recv(1 << 16):
                data += more
            sending.join(PATIENCE_S)
        thread.join(PATIENCE_S)
    assert bytes(data) == SOME
    assert all(net.carried[way] - before[way] > len(SOME) for way in ("up", "down"))


def test_about_as_many_packets_are_lost_as_was_asked_for(post: Post) -> None:
    post.net.shape(Quality(loss=0.3))
    arrived = 0
    for _ in range(300):
        post.send(b"x")
        arrived += post.pending()
    post.net.shape(Quality())
    post.send(b"last")
    while post.receiver.recv(100) != b"last":
        arrived += 1
    assert 0.5 < arrived / 300 < 0.9


def test_what_is_delayed_arrives_later_and_so_may_be_overtaken(post: Post) -> None:
    post.net.shape(Quality(delay_s=NEVER))
    post.send(b"late")
    post.net.shape(Quality())
    post.send(b"early")
    assert post.receiver.recv(100) == b"early"
    assert post.pending() == 0


def test_a_narrow_link_passes_one_packet_after_the_other(post: Post) -> None:
    post.net.shape(Quality(bits_per_s=2000))
    post.send(b"small")
    post.send(bytes(1400))
    assert post.receiver.recv(100) == b"small"
    assert post.pending() == 0, "the large one takes six seconds"


def test_a_link_that_is_cut_loses_what_is_on_it_and_says_nothing(post: Post) -> None:
    post.net.shape(Quality(delay_s=0.05))
    post.send(b"on its way")
    post.net.cut()
    post.send(b"too late")
    until(lambda: not post.net.waiting, "nothing is on the link any more")
    post.net.mend()
    post.send(b"again")
    assert post.receiver.recv(100) == b"again"
    post.sender.send(b"no error has come back")


def test_both_hosts_are_gone_afterwards_even_when_the_block_fails() -> None:
    names: set[str] = set()
    with contextlib.suppress(ZeroDivisionError), network() as net:
        names |= {net.server.name, net.site.name}
        assert names <= {path.name for path in netns.NAMESPACES.iterdir()}
        raise ZeroDivisionError
    assert names
    assert not names & {path.name for path in netns.NAMESPACES.iterdir()}
