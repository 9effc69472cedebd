"""A site on a host of its own, behind a link of 4 Mbit/s, 200 ms and 5 % loss, and one that is cut for a minute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import netns
import pytest
from chaos import proxied
from harness import (
    Federation,
    Running,
    admin_link,
    authority_beside,
    fedge_ok,
    free_port,
    run_toml,
    set_tables,
    simulated,
    until,
)
from netns import Network, Quality, network

from fedge.wire.limits import CHUNK_BYTES

WHY_NOT = netns.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"{WHY_NOT}; test_bad_links.py does the same through a proxy"),
]

SITES = ["client-0", "client-1"]
BIG_BYTES = 4 * (3 * 300_000 + 300_000 + 300_000 + 1)
GIVEN_UP_S = 150.0
CONGESTION_CONTROL = (
    Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip() if not WHY_NOT else ""
)
QUIET = "[evaluation]\nevery = 0\n"
LINKS = {
    "4 Mbit/s": Quality(bits_per_s=4e6),
    "200 ms": Quality(delay_s=0.1),
    "5 % loss": Quality(loss=0.05),
    "all of it": Quality(delay_s=0.1, loss=0.05, bits_per_s=4e6),
}


@dataclass(frozen=True)
class Hosts:
    federation: Federation
    net: Network


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A coordinator and the first site on one host, the second site on another."""
    folder = tmp_path_factory.mktemp("netem")
    home = folder / "coordinator"
    with network() as net, proxied(lambda: net.server.dial(port)) as door:
        port = free_port()
        fedge_ok("server", "init", home, "--listen", f"{net.server.address}:{port}")
        set_tables(home / "admin.toml", {"server": door.address})
        on = net.server.prefix
        server = Running.start("server", "start", home / "server.toml", log=folder / "server.log", on=on)
        started: list[Running] = [server]
        try:
            server.says("coordinator ready")
            with (
                admin_link(home / "admin.toml") as admin,
                authority_beside(home / "server.toml") as authority,
            ):
                federation = Federation(folder, door.address, server, admin, authority)
                for name, host in zip(SITES, (net.server, net.site), strict=True):
                    federation.enrol(name)
                    address = f"{net.server.address}:{port}"
                    set_tables(folder / name / "client.toml", {"server": address})
                    started.append(federation.start(name, on=host.prefix))
                yield Hosts(federation, net)
            assert not any("Traceback" in running.output for running in started)
        finally:
            for running in reversed(started):
                running.end()


@pytest.fixture(autouse=True)
def good_again(hosts: Hosts) -> Iterator[None]:
    yield
    hosts.net.shape(Quality())
    hosts.net.mend()
    until(lambda: hosts.federation.connected() == set(SITES), "both sites are connected")


def check(hosts: Hosts, run_id: str, text: str, *, rounds: int) -> None:
    federation = hosts.federation
    summary = federation.finish(run_id)
    assert summary.status == "done", summary.reason
    assert [list(row.clients) for row in federation.show(run_id).history] == [SITES] * rounds
    assert federation.digest(run_id) == simulated(text)


@pytest.mark.parametrize("link", LINKS)
def test_a_run_over_a_bad_link_comes_out_the_same(hosts: Hosts, link: str) -> None:
    name = f"link-{list(LINKS).index(link)}"
    text = run_toml(name, task="wide:task", rounds=3, more=QUIET)
    hosts.net.shape(LINKS[link])
    check(hosts, hosts.federation.submit(text), text, rounds=3)


@pytest.mark.skipif(
    "bbr" not in CONGESTION_CONTROL,
    reason=f"at 5 % loss TCP itself, with {CONGESTION_CONTROL}, takes minutes for megabytes",
)
def test_a_model_of_megabytes_gets_through_the_worst_link_there_is(hosts: Hosts) -> None:
    text = run_toml("megabytes", task="big:task", rounds=1, more=QUIET)
    hosts.net.shape(LINKS["all of it"])
    check(hosts, hosts.federation.submit(text), text, rounds=1)


def test_a_cut_of_a_minute_in_the_middle_of_an_upload_costs_at_most_a_chunk(hosts: Hosts) -> None:
    """Longer than it takes either end to find out: both give the connection up, and go on over another one."""
    net = hosts.net
    net.shape(Quality(bits_per_s=16e6, delay_s=0.02))
    before = dict(net.carried)
    text = run_toml("minute", task="big:task", rounds=1, more=QUIET)
    text = text.replace("deadline_s = 60", "deadline_s = 600").replace("wait_s = 60", "wait_s = 600")
    run_id = hosts.federation.submit(text)
    until(lambda: net.carried["up"] - before["up"] > BIG_BYTES // 2, "half of the update is up")
    net.cut()
    agent = hosts.federation.clients["client-1"]
    agent.says("session_failed")
    gone = "the coordinator gave it up, too"
    until(lambda: "client-1" not in hosts.federation.connected(), gone, seconds=GIVEN_UP_S)
    net.mend()
    check(hosts, run_id, text, rounds=1)
    headers = 1.08  # of TCP, TLS and HTTP/2
    assert net.carried["up"] - before["up"] <= headers * (BIG_BYTES + CHUNK_BYTES) + (256 << 10)
