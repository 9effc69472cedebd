"""Who has which message of one app, and what came of it. Pure: time is an argument, in seconds of any clock.

A message has one reply. Whoever sends one again that is known changes nothing: the app's ServerApp does so when its
link was broken, and sites hand in again what they have kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Generic, NamedTuple, TypeVar

from fedge.records import node_id

PATIENCE_S: Final = 60.0
"""How long a message waits for a site that is not there, before its reply is that there is no such node."""

WINDOW: Final = 64
"""Messages that one site has at once: the next wait here until its replies are where they are wanted."""

B = TypeVar("B")


@dataclass(slots=True, eq=False)
class Sent(Generic[B]):
    """A message on its way; `what` is None while only its id is known, which its sender has said it waits for."""

    id: str
    node: int = 0
    until: float = float("inf")
    """When nobody wants it any more."""
    what: B | None = None
    site: str = ""
    """Who has it, or has had it last; empty if nobody has."""
    replied: bool = False


class Heard(Enum):
    """What a reply is."""

    TAKEN = auto()
    UNWANTED = auto()
    """It is here already, or nobody waits for it, or not for one of this site."""
    TOO_EARLY = auto()
    """Its site has not joined yet: it will be asked for."""


class Loss(NamedTuple, Generic[B]):
    """A message that counts as replied to: its time is over, or its node is not there."""

    sent: Sent[B]
    expired: bool


@dataclass(slots=True, eq=False)
class _Site(Generic[B]):
    ids: list[int]
    gone_at: float | None = None
    has: dict[str, Sent[B]] = field(default_factory=dict)
    """What it was given, until nobody needs its reply any more."""
    next: deque[Sent[B]] = field(default_factory=deque)


class Exchange(Generic[B]):
    """The messages of one app, which are of some type of the caller's."""

    def __init__(self) -> None:
        self._sites: dict[str, _Site[B]] = {}
        self._nodes: dict[int, str] = {}
        self._sent: dict[str, Sent[B]] = {}
        self._by_node: dict[int, dict[str, Sent[B]]] = {}
        self._unknown_since: dict[int, float] = {}

    def __len__(self) -> int:
        """Messages whose replies are not taken yet."""
        return len(self._sent)

    @property
    def unanswered(self) -> int:
        return sum(1 for each in self._sent.values() if not each.replied)

    @property
    def sites(self) -> list[str]:
        """Those that are there."""
        return [name for name in self._sites if self.is_here(name)]

    def is_here(self, name: str) -> bool:
        """Whether a site takes part and is there."""
        site = self._sites.get(name)
        return site is not None and site.gone_at is None

    def nodes(self) -> list[int]:
        """Those of the sites that are there, in the order of sites' names."""
        return [id for name in sorted(self.sites) for id in self._sites[name].ids]

    def wait_for(self, ids: Iterable[str]) -> list[Sent[B]]:
        """The app's ServerApp is here (again), and waits for these and no others; what is of no use any more.

        Those that are not known yet come soon, or their replies do.
        """
        wanted = set(ids)
        over = self.forget([id for id in self._sent if id not in wanted])
        for id in wanted:
            self._sent.setdefault(id, Sent(id))
        return over

    def send(self, id: str, node: int, what: B, *, until: float, now: float) -> str:
        """A message to a node; the site that may have something due now, empty if there is none."""
        known = self._sent.get(id)
        if known is not None and (known.what is not None or known.replied):
            return ""
        sent = self._sent.setdefault(id, Sent(id))
        sent.node, sent.until, sent.what = node, until, what
        self._by_node.setdefault(node, {})[id] = sent
        name = self._nodes.get(node, "")
        if not name:
            self._unknown_since.setdefault(node, now)
            return ""
        if id in self._sites[name].has:  # it has said so before this was sent again
            return ""
        self._sites[name].next.append(sent)
        return name

    def due(self, name: str) -> list[Sent[B]]:
        """What a site is to be given now."""
        site = self._sites.get(name)
        found: list[Sent[B]] = []
        if site is None or site.gone_at is not None:
            return found
        while site.next and len(site.has) < WINDOW:
            sent = site.next.popleft()
            if not sent.replied and self._sent.get(sent.id) is sent:
                sent.site = name
                site.has[sent.id] = sent
                found.append(sent)
        return found

    def join(self, name: str, nodes: int, ids: Collection[str], *, now: float) -> list[str]:
        """A site is there, and has these messages, or their replies: those of its own that nobody wants."""
        before = self._sites.get(name)
        for node in before.ids[nodes:] if before is not None else ():
            del self._nodes[node]
            self._unknown_since[node] = now
        site = self._sites[name] = _Site([node_id(name, at) for at in range(nodes)])
        has = set(ids)
        for id in ids:
            known = self._sent.get(id)
            if known is not None and known.what is None and not known.replied:
                known.site = name
                site.has[id] = known
        for node in site.ids:
            self._nodes[node] = name
            self._unknown_since.pop(node, None)
            for sent in self._by_node.get(node, {}).values():
                if sent.id in has:
                    sent.site = name
                    site.has[sent.id] = sent
                elif not sent.replied:
                    site.next.append(sent)
        return [id for id in ids if id not in self._sent or self._sent[id].replied]

    def leave(self, name: str, *, now: float) -> None:
        """A site's link is gone; it may come back."""
        site = self._sites.get(name)
        if site is not None and site.gone_at is None:
            site.gone_at = now
            site.has, site.next = {}, deque()

    def refuse(self, name: str) -> list[Sent[B]]:
        """A site does not take part (any more): what it had been sent will have no reply from it."""
        site = self._sites.pop(name, None)
        lost = []
        for node in site.ids if site is not None else ():
            del self._nodes[node]
            lost += [each for each in self._by_node.get(node, {}).values() if not each.replied]
        for each in lost:
            each.replied = True
        return lost

    def reply(self, name: str, id: str) -> Heard:
        """A site hands in the reply to a message. Its place is free again when that is where it is wanted."""
        heard = self.would_hear(name, id)
        if heard is Heard.TAKEN:
            sent = self._sent[id]
            sent.site, sent.replied = name, True
        return heard

    def would_hear(self, name: str, id: str) -> Heard:
        """What a reply to this from this site would be."""
        sent = self._sent.get(id)
        if sent is None or sent.replied:
            return Heard.UNWANTED
        if sent.what is None:
            return Heard.TAKEN
        owner = self._nodes.get(sent.node, "")
        if not owner:
            return Heard.TOO_EARLY
        return Heard.TAKEN if owner == name else Heard.UNWANTED

    def of_site(self, name: str) -> list[Sent[B]]:
        """What a site has and has not replied to."""
        site = self._sites.get(name)
        return [each for each in site.has.values() if not each.replied] if site is not None else []

    def forget(self, ids: Iterable[str]) -> list[Sent[B]]:
        """Nobody waits for these: their replies are where they are wanted, or they are not wanted. Those there were."""
        found = [self._sent.pop(id) for id in ids if id in self._sent]
        for sent in found:
            self._free(sent)
            self._by_node.get(sent.node, {}).pop(sent.id, None)
            if not self._by_node.get(sent.node, True):
                del self._by_node[sent.node]
        return found

    def lost(self, *, now: float) -> list[Loss[B]]:
        """Messages whose nodes have not been there for too long, or whose time is over: they count as replied to."""
        gone = {
            name
            for name, site in self._sites.items()
            if site.gone_at is not None and now - site.gone_at >= PATIENCE_S
        }
        unknown = {node for node, since in self._unknown_since.items() if now - since >= PATIENCE_S}
        found = [
            Loss(each, each.until <= now)
            for each in self._sent.values()
            if each.what is not None
            and not each.replied
            and (each.until <= now or each.node in unknown or self._nodes.get(each.node, "") in gone)
        ]
        for sent, _ in found:
            sent.replied = True
            self._free(sent)
        return found

    def _free(self, sent: Sent[B]) -> None:
        site = self._sites.get(sent.site)
        if site is not None:
            site.has.pop(sent.id, None)
