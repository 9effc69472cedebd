"""A link that is away for a while in the middle of a vector, refusing or swallowing: shorter and longer than it takes
either end to give it up. In contrast to `test_bad_links.py`, whose links are mended at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from chaos import Proxy, Way, proxied
from harness import Federation, coordinator, run_toml, set_tables, simulated, until

from fedge.wire.limits import CHUNK_BYTES

SITES = ["client-0", "client-1"]
MODEL_BYTES = 4 * (3 * 300_000 + 300_000 + 300_000 + 1)
OVERHEAD_BYTES = 256 << 10
"""Handshakes, frames and messages of a run with a few reconnections."""
A_WHILE_S = 2.0
GIVEN_UP_S = 150.0
BROKEN_OFF = int(0.6 * MODEL_BYTES)
UP, DOWN = 0, 1
both = pytest.mark.parametrize("way", [UP, DOWN], ids=["up", "down"])
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Linked:
    """A federation whose second site is behind a proxy."""

    federation: Federation
    proxy: Proxy

    def begin(self, name: str, way: Way) -> str:
        """Submit a run of one round over a narrow link, whose counter is at zero."""
        way.bytes_per_s = 8e6
        way.mark()
        return self.federation.submit(text_of(name))

    def check(self, run_id: str, digest: str) -> None:
        federation = self.federation
        summary = federation.finish(run_id)
        assert summary.status == "done", summary.reason
        (row,) = federation.show(run_id).history
        assert list(row.clients) == SITES
        assert row.attempt == 1
        assert federation.digest(run_id) == digest


@pytest.fixture(scope="module")
def digest() -> str:
    """What the run comes to without any trouble."""
    return simulated(text_of("quiet"))


@pytest.fixture(scope="module")
def federation_and_link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linked]:
    with coordinator(tmp_path_factory.mktemp("given-up")) as federation, proxied(federation.address) as proxy:
        for name in SITES:
            federation.enrol(name)
        set_tables(federation.folder / "client-1" / "client.toml", {"server": proxy.address})
        for name in SITES:
            federation.start(name)
        yield Linked(federation, proxy)
        for name, client in federation.clients.items():
            assert client.process.poll() is None, f"{name} goes on"
            assert "Traceback" not in client.output
        assert "Traceback" not in federation.server.output


@pytest.fixture
def linked(federation_and_link: Linked) -> Iterator[Linked]:
    yield federation_and_link
    proxy, federation = federation_and_link.proxy, federation_and_link.federation
    for way in proxy.ways:
        way.latency_s = way.bytes_per_s = 0.0
    proxy.mend()
    until(lambda: federation.connected() == set(SITES), "both sites are connected")


def text_of(name: str) -> str:
    """A run that waits longer than any of these links is away."""
    text = run_toml(name, task="big:task", rounds=1, more="[evaluation]\nevery = 0\n")
    return text.replace("deadline_s = 60", "deadline_s = 600").replace("wait_s = 60", "wait_s = 600")


def sent_twice(way: Way) -> int:
    """Bytes that passed beyond what the run's vector measures."""
    return way.since_mark - MODEL_BYTES


@both
def test_a_site_that_is_refused_for_a_while_tries_on_and_sends_at_most_one_chunk_again(
    linked: Linked, digest: str, way: int
) -> None:
    proxy, cut = linked.proxy, linked.proxy.ways[way]
    cut.cut_after(BROKEN_OFF)
    run_id = linked.begin(f"refused-{way}", cut)
    until(lambda: proxy.state == "cut", "the link is cut in the middle of a vector")
    tried = proxy.connections
    until(lambda: proxy.connections >= tried + 3, "the site has tried to come back, in vain")
    proxy.mend()
    linked.check(run_id, digest)
    assert sent_twice(cut) <= CHUNK_BYTES + OVERHEAD_BYTES


@both
def test_a_link_that_swallows_everything_for_a_while_costs_nothing(
    linked: Linked, digest: str, way: int
) -> None:
    proxy, swallowing = linked.proxy, linked.proxy.ways[way]
    connections = proxy.connections
    swallowing.blackhole_after(BROKEN_OFF)
    run_id = linked.begin(f"hole-{way}", swallowing)
    until(lambda: proxy.state == "blackhole", "nothing passes any more")
    time.sleep(A_WHILE_S)
    proxy.mend()
    linked.check(run_id, digest)
    assert proxy.connections == connections, "neither end has given its connection up"
    assert sent_twice(swallowing) <= OVERHEAD_BYTES


@both
def test_a_link_that_both_ends_have_given_up_costs_at_most_one_chunk(
    linked: Linked, digest: str, way: int
) -> None:
    federation, proxy, swallowing = linked.federation, linked.proxy, linked.proxy.ways[way]
    agent = federation.clients["client-1"]
    failed = agent.output.count("session_failed")
    swallowing.blackhole_after(BROKEN_OFF)
    run_id = linked.begin(f"long-hole-{way}", swallowing)
    until(lambda: proxy.state == "blackhole", "nothing passes any more")
    until(lambda: "client-1" not in federation.connected(), "the coordinator gave it up", seconds=GIVEN_UP_S)
    agent.says("session_failed", times=failed + 1)
    assert federation.show(run_id).summary.status in ("running", "waiting")
    proxy.mend()
    linked.check(run_id, digest)
    assert sent_twice(swallowing) <= CHUNK_BYTES + OVERHEAD_BYTES
