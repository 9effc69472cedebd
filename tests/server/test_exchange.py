"""Messages between an app's ServerApp and the sites' nodes: whatever breaks, each has one reply, and is done once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedge.records import node_id
from fedge_server.apps.exchange import PATIENCE_S, WINDOW, Exchange, Heard

SITES = {"a": 2, "b": 1}
NODES = {node_id(name, at): name for name, count in SITES.items() for at in range(count)}
FOREVER = 1e9


class Apps(RuleBasedStateMachine):
    """An app, its coordinator and two sites; any of the three is killed and comes back, and any link breaks."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.exchange: Exchange[str] = Exchange()
        self.asked: dict[str, int] = {}
        """What the ServerApp waits for."""
        self.sent = 0
        self.replies: dict[str, int] = {}
        """What it has."""
        self.connected: set[str] = set()
        self.under_way: dict[str, set[str]] = {name: set() for name in SITES}
        self.kept: dict[str, set[str]] = {name: set() for name in SITES}
        self.done: dict[str, int] = {}
        """How often a message was dealt with."""
        self.held: list[str] = []
        """Replies at the coordinator that the ServerApp has not been given."""

    def give(self, name: str) -> None:
        """A site is sent what is due."""
        for sent in self.exchange.due(name):
            assert NODES[sent.node] == name
            assert sent.id not in self.under_way[name] | self.kept[name], (
                "nothing is sent to a site that has it"
            )
            self.under_way[name].add(sent.id)

    @rule(node=st.sampled_from(sorted(NODES)))
    def ask(self, node: int) -> None:
        self.sent += 1
        self.asked[str(self.sent)] = node
        self.give(self.exchange.send(str(self.sent), node, "x", until=FOREVER, now=self.now))

    @rule(name=st.sampled_from(sorted(SITES)))
    def connect(self, name: str) -> None:
        self.connected.add(name)
        ids = sorted(self.under_way[name] | self.kept[name])
        for id in self.exchange.join(name, SITES[name], ids, now=self.now):
            self.under_way[name].discard(id)
            self.kept[name].discard(id)
        for id in sorted(self.kept[name]):
            self.hand_in(name, id)
        self.give(name)

    @rule(name=st.sampled_from(sorted(SITES)))
    def break_link(self, name: str) -> None:
        self.connected.discard(name)
        self.exchange.leave(name, now=self.now)

    @rule(name=st.sampled_from(sorted(SITES)))
    def kill_site(self, name: str) -> None:
        """What it was at is lost, what it has kept is not."""
        self.break_link(name)
        self.under_way[name].clear()

    @rule(name=st.sampled_from(sorted(SITES)))
    def work(self, name: str) -> None:
        if self.under_way[name]:
            id = min(self.under_way[name])
            self.under_way[name].discard(id)
            self.kept[name].add(id)
            self.done[id] = self.done.get(id, 0) + 1
            if name in self.connected:
                self.hand_in(name, id)
                self.give(name)

    def hand_in(self, name: str, id: str) -> None:
        match self.exchange.reply(name, id):
            case Heard.TAKEN:
                self.held.append(id)
            case Heard.UNWANTED if id not in self.held:
                self.kept[name].discard(id)

    @rule()
    def take(self) -> None:
        """The ServerApp's process gets its replies."""
        for id in self.held:
            assert id in self.asked, "nobody is given what they do not wait for"
            del self.asked[id]
            self.replies[id] = self.replies.get(id, 0) + 1
        for sent in self.exchange.forget(self.held):
            if sent.site in self.connected:
                self.kept[sent.site].discard(sent.id)
                self.give(sent.site)
        self.held = []

    @rule()
    def kill_coordinator(self) -> None:
        """It begins with nothing; the process comes back first, then the sites do."""
        for name in SITES:
            self.connected.discard(name)
        self.exchange, self.held = Exchange(), []
        self.exchange.wait_for(self.asked)

    @rule()
    def come_back(self) -> None:
        """The process sends again what has no reply."""
        for sent in self.exchange.wait_for(self.asked):
            if sent.site in self.connected:
                self.kept[sent.site].discard(sent.id)
        for id, node in self.asked.items():
            self.give(self.exchange.send(id, node, "x", until=FOREVER, now=self.now))

    @invariant()
    def each_has_one_reply_and_is_done_once(self) -> None:
        assert all(count == 1 for count in self.replies.values())
        assert all(count == 1 for count in self.done.values())

    def teardown(self) -> None:
        """In the end all are there, and everything that was asked has its reply."""
        if not hasattr(self, "exchange"):
            return
        self.come_back()
        for name in SITES:
            self.connect(name)
        for _ in range(self.sent + 1):
            for name in SITES:
                self.work(name)
        self.take()
        assert self.asked == {}
        assert len(self.replies) == self.sent
        assert len(self.exchange) == 0


TestApps = Apps.TestCase
TestApps.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.fixture
def exchange() -> Exchange[str]:
    found: Exchange[str] = Exchange()
    found.join("a", 2, [], now=0.0)
    return found


A0, A1, B0 = node_id("a", 0), node_id("a", 1), node_id("b", 0)


def lost(found: list[Any]) -> list[str]:
    return [each.sent.id for each in found]


def ids(found: list[object]) -> list[str]:
    return [each.id for each in found]  # type: ignore[attr-defined]


def test_a_site_has_so_many_messages_at_once_and_the_next_when_a_reply_is_where_it_is_wanted(
    exchange: Exchange[str],
):
    for at in range(WINDOW + 2):
        assert exchange.send(str(at), A0, "x", until=FOREVER, now=0.0) == "a"
    assert len(exchange.due("a")) == WINDOW
    assert exchange.due("a") == []
    assert exchange.reply("a", "5") is Heard.TAKEN
    assert exchange.due("a") == [], "it is still on its way: whoever does not take replies is given no more"
    exchange.forget(["5"])
    assert ids(exchange.due("a")) == [str(WINDOW)]
    exchange.forget(["7"])
    assert ids(exchange.due("a")) == [str(WINDOW + 1)]


def test_a_message_for_a_node_that_does_not_come_is_lost_after_a_while(exchange: Exchange[str]):
    assert exchange.send("1", B0, "x", until=FOREVER, now=0.0) == ""
    assert exchange.lost(now=PATIENCE_S - 1) == []
    assert lost(exchange.lost(now=PATIENCE_S)) == ["1"]
    assert exchange.lost(now=PATIENCE_S) == [], "once"
    exchange.send("2", B0, "x", until=FOREVER, now=PATIENCE_S)
    assert lost(exchange.lost(now=PATIENCE_S)) == ["2"], "it is not waited for again"
    exchange.join("b", 1, [], now=PATIENCE_S)
    exchange.send("3", B0, "x", until=FOREVER, now=PATIENCE_S)
    assert exchange.lost(now=9 * PATIENCE_S) == []
    assert ids(exchange.due("b")) == ["3"]


def test_a_message_is_lost_when_its_site_is_gone_for_a_while_and_not_when_it_comes_back(
    exchange: Exchange[str],
):
    exchange.send("1", A0, "x", until=FOREVER, now=0.0)
    assert ids(exchange.due("a")) == ["1"]
    exchange.leave("a", now=10.0)
    assert exchange.nodes() == []
    assert exchange.lost(now=10.0 + PATIENCE_S - 1) == []
    exchange.join("a", 2, ["1"], now=60.0)
    assert exchange.lost(now=10.0 + PATIENCE_S) == []
    exchange.leave("a", now=80.0)
    assert lost(exchange.lost(now=80.0 + PATIENCE_S)) == ["1"]
    assert exchange.reply("a", "1") is Heard.UNWANTED, "its reply is that it is lost"


def test_a_message_is_lost_when_its_time_is_over(exchange: Exchange[str]):
    exchange.send("1", A0, "x", until=5.0, now=0.0)
    assert exchange.lost(now=4.0) == []
    exchange.send("2", B0, "x", until=FOREVER, now=0.0)
    assert [each.expired for each in exchange.lost(now=5.0)] == [True]
    assert [each.expired for each in exchange.lost(now=PATIENCE_S)] == [False]


def test_messages_whose_time_is_over_leave_room_for_others(exchange: Exchange[str]):
    for at in range(WINDOW + 1):
        exchange.send(str(at), A0, "x", until=5.0 if at < WINDOW else FOREVER, now=0.0)
    assert len(exchange.due("a")) == WINDOW
    assert len(exchange.lost(now=5.0)) == WINDOW
    assert ids(exchange.due("a")) == [str(WINDOW)]


def test_a_reply_counts_once_and_from_the_node_that_was_asked(exchange: Exchange[str]):
    exchange.join("b", 1, [], now=0.0)
    exchange.send("1", A0, "x", until=FOREVER, now=0.0)
    heard = [exchange.reply(*each) for each in (("b", "1"), ("a", "2"), ("a", "1"), ("a", "1"))]
    assert heard == [Heard.UNWANTED, Heard.UNWANTED, Heard.TAKEN, Heard.UNWANTED]


def test_a_reply_that_comes_before_its_site_has_joined_is_not_called_unwanted():
    exchange: Exchange[str] = Exchange()
    exchange.wait_for(["1"])
    exchange.send("1", A0, "x", until=FOREVER, now=0.0)
    assert exchange.reply("a", "1") is Heard.TOO_EARLY
    assert exchange.join("a", 2, ["1"], now=0.0) == []
    assert exchange.reply("a", "1") is Heard.TAKEN


def test_a_site_that_refuses_loses_its_messages_and_its_nodes(exchange: Exchange[str]):
    exchange.join("b", 1, [], now=0.0)
    for id, node in (("1", A0), ("2", A1), ("3", B0)):
        exchange.send(id, node, "x", until=FOREVER, now=0.0)
    assert ids(exchange.refuse("a")) == ["1", "2"]
    assert (exchange.nodes(), exchange.sites, exchange.unanswered) == ([B0], ["b"], 1)
    assert exchange.refuse("a") == []


def test_a_site_that_comes_back_with_fewer_nodes_has_no_others(exchange: Exchange[str]):
    exchange.send("1", A1, "x", until=FOREVER, now=0.0)
    exchange.leave("a", now=0.0)
    exchange.join("a", 1, [], now=1.0)
    assert exchange.nodes() == [A0]
    assert exchange.due("a") == []
    assert lost(exchange.lost(now=1.0 + PATIENCE_S)) == ["1"]


def test_a_site_is_told_what_of_its_own_nobody_wants(exchange: Exchange[str]):
    exchange.wait_for(["1"])
    assert exchange.join("a", 2, ["1", "2"], now=0.0) == ["2"]
    assert exchange.reply("a", "1") is Heard.TAKEN, "before it was sent again"
    assert exchange.send("1", A0, "x", until=FOREVER, now=0.0) == ""
    assert exchange.due("a") == []


def test_content_may_be_fetched_by_those_who_have_the_message_and_no_longer(exchange: Exchange[str]):
    exchange.send("1", A0, "x", until=FOREVER, now=0.0)
    assert exchange.of_site("a") == []
    exchange.due("a")
    assert ids(exchange.of_site("a")) == ["1"]
    exchange.reply("a", "1")
    assert exchange.of_site("a") == []
    assert exchange.of_site("nobody") == []
