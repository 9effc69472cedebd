"""Links that are slow, break, swallow and corrupt: a run comes out to the same bits, and little is sent twice.

The second site's client reaches the coordinator through a proxy in this process; see `chaos`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from chaos import Proxy, Way, proxied
from harness import Federation, coordinator, run_toml, set_tables, simulated, until

from fedge.wire.limits import CHUNK_BYTES

SITES = ["client-0", "client-1"]
ROUNDS = 2
MODEL_BYTES = 4 * (3 * 300_000 + 300_000 + 300_000 + 1)
OVERHEAD_BYTES = 256 << 10
"""Handshakes, frames and messages of a run with a few reconnections."""

QUIET = "[evaluation]\nevery = 0\n"
UP, DOWN = 0, 1
both = pytest.mark.parametrize("way", [UP, DOWN], ids=["up", "down"])
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digest() -> str:
    """What the run comes to without any trouble."""
    return simulated(text_of("quiet"))


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Proxy]]:
    """A federation whose second site is behind a proxy."""
    with coordinator(tmp_path_factory.mktemp("links")) as federation, proxied(federation.address) as proxy:
        for name in SITES:
            federation.enrol(name)
        set_tables(federation.folder / "client-1" / "client.toml", {"server": proxy.address})
        for name in SITES:
            federation.start(name)
        yield federation, proxy
        for name, client in federation.clients.items():
            assert client.process.poll() is None, f"{name} goes on"
            assert "Traceback" not in client.output
        assert "Traceback" not in federation.server.output


@pytest.fixture(autouse=True)
def mended(linked: tuple[Federation, Proxy]) -> Iterator[None]:
    yield
    federation, proxy = linked
    for way in proxy.ways:
        way.latency_s = way.bytes_per_s = 0.0
    proxy.mend()
    until(lambda: federation.connected() == set(SITES), "both sites are connected")


def text_of(name: str) -> str:
    return run_toml(name, task="big:task", rounds=ROUNDS, more=QUIET)


def begin(linked: tuple[Federation, Proxy], name: str) -> str:
    """Submit the run, with counters at zero."""
    federation, proxy = linked
    for way in proxy.ways:
        way.mark()
    return federation.submit(text_of(name))


def check(federation: Federation, run_id: str, digest: str) -> None:
    summary = federation.finish(run_id)
    assert summary.status == "done", summary.reason
    history = federation.show(run_id).history
    assert [list(row.clients) for row in history] == [SITES] * ROUNDS
    assert [row.attempt for row in history] == [1] * ROUNDS
    assert federation.digest(run_id) == digest


def sent_twice(way: Way) -> int:
    """Bytes that passed beyond what the run's vectors measure."""
    return way.since_mark - ROUNDS * MODEL_BYTES


def test_a_link_that_is_slow_to_answer(linked: tuple[Federation, Proxy], digest: str) -> None:
    federation, proxy = linked
    for way in proxy.ways:
        way.latency_s = 0.1
    check(federation, begin(linked, "latency"), digest)


def test_an_agent_that_starts_behind_a_link_that_is_slow_to_answer_connects(
    linked: tuple[Federation, Proxy],
) -> None:
    """Found by a benchmark: an attempt to connect was given up after a tenth of a second."""
    federation, proxy = linked
    for way in proxy.ways:
        way.latency_s = 0.15
    federation.clients["client-1"].signal(signal.SIGTERM)
    until(lambda: "client-1" not in federation.connected(), "it is gone")
    federation.start("client-1")


def test_a_narrow_link(linked: tuple[Federation, Proxy], digest: str) -> None:
    federation, proxy = linked
    for way in proxy.ways:
        way.bytes_per_s = 4e6
    check(federation, begin(linked, "narrow"), digest)
    assert max(sent_twice(way) for way in proxy.ways) <= OVERHEAD_BYTES


@both
def test_after_a_cut_at_most_one_chunk_is_sent_again(
    linked: tuple[Federation, Proxy], digest: str, way: int
) -> None:
    federation, proxy = linked
    cut = proxy.ways[way]
    cut.bytes_per_s = 8e6
    cut.cut_after(int(0.6 * MODEL_BYTES))
    run_id = begin(linked, f"cut-{way}")
    until(lambda: proxy.state == "cut", "the link is cut in the middle of a vector")
    proxy.mend()
    check(federation, run_id, digest)
    assert sent_twice(cut) <= CHUNK_BYTES + OVERHEAD_BYTES


@both
def test_cuts_one_after_another(linked: tuple[Federation, Proxy], digest: str, way: int) -> None:
    federation, proxy = linked
    cut = proxy.ways[way]
    cut.bytes_per_s = 8e6
    cut.cut_after(int(0.3 * MODEL_BYTES))
    run_id = begin(linked, f"cuts-{way}")
    cuts = 3
    for more in range(1, cuts + 1):
        until(lambda: proxy.state == "cut", "the link is cut")
        if more < cuts:
            cut.cut_after(2 * CHUNK_BYTES)
        proxy.mend()
    check(federation, run_id, digest)
    assert sent_twice(cut) <= cuts * (CHUNK_BYTES + OVERHEAD_BYTES)


@both
def test_a_link_that_swallows_everything_for_a_while(
    linked: tuple[Federation, Proxy], digest: str, way: int
) -> None:
    federation, proxy = linked
    swallowing = proxy.ways[way]
    swallowing.bytes_per_s = 8e6
    swallowing.blackhole_after(int(0.6 * MODEL_BYTES))
    run_id = begin(linked, f"hole-{way}")
    until(lambda: proxy.state == "blackhole", "nothing passes any more")
    proxy.mend()
    check(federation, run_id, digest)


@both
def test_a_byte_that_is_changed_on_the_way_reaches_nobody(
    linked: tuple[Federation, Proxy], digest: str, way: int
) -> None:
    federation, proxy = linked
    run_id = begin(linked, f"corrupt-{way}")
    proxy.ways[way].corrupt(after_bytes=MODEL_BYTES // 2)
    check(federation, run_id, digest)
    assert proxy.ways[way].corrupted
