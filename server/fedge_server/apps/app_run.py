"""One Flower app that runs on this coordinator: its messages go to sites, and their replies to its ServerApp's process.

Nothing of it is kept on disk but what is on its way: the ServerApp's own state is in its process, which comes back
after a broken link, or another coordinator's start, and sends again what has no reply.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fedge.errors import BusyError, FedgeError, LimitError, RemoteProtocolError, RunError, StorageError
from fedge.records import MAX_NODES_OF_A_SITE, AppError, AppMessage, ErrorCode
from fedge.refusal import Refusal
from fedge.wire import fedge_pb2 as pb
from fedge.wire import records
from fedge.wire.chunks import Piece, app_event
from fedge.wire.limits import APP_CHUNK_BYTES, MAX_NAME_BYTES
from fedge_server.apps.exchange import Exchange, Heard, Sent
from fedge_server.spool import Upload

log = logging.getLogger(__name__)

ANSWERS_S: Final = 5.0
"""How long a new app waits for the sites that are there to say whether they take part."""

LINGER_S: Final = 900.0
"""How long an app waits for its ServerApp's process to come back: longer than that one tries to."""

MAX_IDS: Final = 4096
"""Messages that a site names when it joins: more than it is given at once."""

MAX_MESSAGES: Final = 100_000
"""Of one app, without a reply that was taken."""

Send = Callable[[str, pb.ServerMessage], None]
"""Sends a message to a site, if that is connected."""


@dataclass(frozen=True, slots=True, eq=False)
class Letter:
    """A message to a site, or its reply. Its content is in `stored` unless it is inline; letters may share both."""

    message: pb.AppMessage
    content: pb.Blob | None
    stored: Upload | None

    def whole(self) -> pb.AppMessage:
        """As it goes over the wire."""
        whole = pb.AppMessage(content=self.content)
        whole.MergeFrom(self.message)
        return whole


class AppRun:
    """Its methods belong to the event loop's thread."""

    def __init__(self, offer: pb.AppOffer, send: Send, *, admin: str) -> None:
        self.run_id = offer.run_id
        self.offer = offer
        self.admin = admin
        self.submitted_at = time.time()
        self.refusals: dict[str, Refusal] = {}
        self.exchange: Exchange[Letter] = Exchange()
        self._send = send
        self._asked: set[str] = set()
        self._answered = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._attached: object | None = None
        self._detached_at = self._clock()
        self._kept: dict[str, Letter] = {}
        """Replies that are not known to have arrived at the process, by their messages' ids."""
        self._replies: deque[Letter] = deque()
        self._nodes_changed = True
        self._news = asyncio.Event()
        self._over: FedgeError | None = None

    # The ServerApp's process.

    def attach(self, whose: object, waiting: Iterable[str]) -> None:
        """The process of the app's ServerApp has a stream (again): whoever had one before is sent away."""
        self._attached = whose
        self._nodes_changed = True
        self._forget(self.exchange.wait_for(waiting))
        self._replies = deque(self._kept.values())
        self._news.set()

    def detach(self, whose: object) -> None:
        """Its stream has ended; it may come back."""
        if self._attached is whose:
            self._attached, self._detached_at = None, self._clock()

    @property
    def deserted(self) -> bool:
        """Whether the process has not come back for too long."""
        return self._attached is None and self._clock() - self._detached_at >= LINGER_S

    @property
    def is_attended(self) -> bool:
        return self._attached is not None

    def end(self, error: FedgeError) -> None:
        """The process is told that it cannot go on here."""
        self._over = error
        self.wake()

    def wake(self) -> None:
        """Whoever waits for events is to look whether it still may."""
        self._news.set()

    async def answers(self) -> None:
        """Wait until those sites that are there have said whether they take part, for a moment at most."""
        if self._asked:
            try:
                async with asyncio.timeout(ANSWERS_S):
                    await self._answered.wait()
            except TimeoutError:
                log.warning("app_not_answered run=%s sites=%s", self.run_id, ",".join(sorted(self._asked)))

    def send(self, messages: Iterable[pb.AppMessage], content: pb.Blob, stored: Upload | None) -> None:
        """Send messages of the same content to their nodes.

        Raises:
            LimitError: there are too many without a reply.
        """
        now = self._clock()
        for message in messages:
            if len(self.exchange) >= MAX_MESSAGES:
                raise LimitError(
                    f"expected at most {MAX_MESSAGES} messages of an app without a reply, found more"
                )
            about = records.decode(message)
            letter, until = Letter(message, content, stored), now + max(0.0, about.ttl)
            self._post(self.exchange.send(about.id, about.node, letter, until=until, now=now))

    def forget(self, ids: Iterable[str]) -> None:
        """The process has the replies to these, or does not want them any more."""
        self._forget(self.exchange.forget(ids))

    async def events(self, whose: object) -> AsyncIterator[pb.AppEvent | bytes]:
        """What the process is told, as it happens, for as long as its stream is the one that counts.

        Raises:
            FedgeError: it cannot go on here.
        """
        while self._attached is whose:
            if self._over is not None:
                raise self._over
            if self._nodes_changed:
                self._nodes_changed = False
                refusals = [f"{site}: {refusal}" for site, refusal in sorted(self.refusals.items())]
                yield pb.AppEvent(nodes=pb.AppNodes(ids=self.exchange.nodes(), refusals=refusals))
            elif self._replies:
                letter = self._replies.popleft()
                if letter.message.reply_to not in self._kept:
                    continue
                yield pb.AppEvent(reply=letter.whole())
                if letter.stored is not None:
                    for start in range(0, letter.stored.size, APP_CHUNK_BYTES):
                        yield app_event(self._part(letter, letter.stored, start))
            else:
                self._news.clear()
                await self._news.wait()
        raise RunError("another process goes on with this app")

    # Sites.

    def ask(self, site: str) -> None:
        """Offer the app to a site."""
        self._asked.add(site)
        self._answered.clear()
        self._send(site, pb.ServerMessage(app_offer=self.offer))

    def join(self, site: str, joined: pb.AppJoin) -> None:
        """A site takes part.

        Raises:
            LimitError: with more nodes than one may have.
        """
        if not 1 <= joined.nodes <= MAX_NODES_OF_A_SITE:
            raise LimitError(f"expected 1 to {MAX_NODES_OF_A_SITE} nodes of a site, found {joined.nodes}")
        if len(joined.ids) > MAX_IDS or any(len(id) > MAX_NAME_BYTES for id in joined.ids):
            raise LimitError(
                f"expected at most {MAX_IDS} ids of messages, found {len(joined.ids)}, or long ones"
            )
        if self.exchange.is_here(site):
            raise RemoteProtocolError("expected a site to join an app once in a session, found it again")
        self.refusals.pop(site, None)
        unwanted = self.exchange.join(site, joined.nodes, joined.ids, now=self._clock())
        log.info("app_joined run=%s site=%s nodes=%d", self.run_id, site, joined.nodes)
        # Also if there are none: it hands in what it has kept once it knows what is wanted.
        self._send(site, pb.ServerMessage(app_forget=pb.AppIds(run_id=self.run_id, ids=unwanted)))
        self._post(site)
        self._has_answered(site)

    def refuse(self, site: str, refusal: Refusal) -> None:
        """A site does not take part."""
        log.warning("app_refused run=%s site=%s reason=%s", self.run_id, site, refusal)
        self.refusals[site] = refusal
        for sent in self.exchange.refuse(site):
            self._fail(sent.id, sent.node, ErrorCode.NODE_UNAVAILABLE, f"the site refuses the app: {refusal}")
        self._has_answered(site)

    def leave(self, site: str) -> None:
        """A site's link is gone."""
        self.exchange.leave(site, now=self._clock())
        self._has_answered(site)

    def find(self, site: str, digest: bytes) -> Upload | None:
        """Stored content that one of the site's messages names."""
        for sent in self.exchange.of_site(site):
            if sent.what is not None and sent.what.stored is not None and sent.what.stored.digest == digest:
                return sent.what.stored
        return None

    def reply(self, site: str, message: pb.AppMessage, stored: Upload | None) -> None:
        """A site's reply to a message, with its content if that is not inline."""
        match self.exchange.reply(site, message.reply_to):
            case Heard.TAKEN:
                self._hand_in(Letter(message, None, stored))
            case Heard.UNWANTED:
                self.tell_unwanted(site, message.reply_to)
            case Heard.TOO_EARLY:
                pass  # it comes again when the site has joined

    def tell_unwanted(self, site: str, id: str) -> None:
        """Nobody waits for a site's reply to this message."""
        ids = pb.AppIds(run_id=self.run_id, ids=[id])
        self._send(site, pb.ServerMessage(app_forget=ids))

    @property
    def kept_bytes(self) -> int:
        """Of replies that are stored here until they are taken."""
        return sum(each.stored.size for each in self._kept.values() if each.stored is not None)

    def look(self) -> None:
        """Now and then: what has waited for too long is answered."""
        for sent, expired in self.exchange.lost(now=self._clock()):
            if expired:
                why = "there was no reply within the time that the message had"
                self._fail(sent.id, sent.node, ErrorCode.MESSAGE_UNAVAILABLE, why)
            else:
                self._fail(sent.id, sent.node, ErrorCode.NODE_UNAVAILABLE, "its site is not connected")
            if sent.site:
                self.tell_unwanted(sent.site, sent.id)
                self._post(sent.site)

    # Parts.

    def _post(self, site: str) -> None:
        """Give a site what is due."""
        for sent in self.exchange.due(site):
            assert sent.what is not None  # only such are given to anybody
            left_s = max(0.0, sent.until - self._clock())
            order = pb.AppOrder(run_id=self.run_id, message=sent.what.whole(), left_s=left_s)
            self._send(site, pb.ServerMessage(app_order=order))

    def _part(self, letter: Letter, stored: Upload, start: int) -> Piece:
        """A part of a stored reply.

        Raises:
            BusyError: it cannot be read back; over the next stream there is an error in its place.
        """
        try:
            return stored.read(start, min(start + APP_CHUNK_BYTES, stored.size))
        except StorageError as error:
            log.error("app_reply_lost run=%s reason=%s", self.run_id, error)
            why = "the coordinator has lost the reply: see its log"
            self._fail(letter.message.reply_to, letter.message.src, ErrorCode.UNKNOWN, why)
            raise BusyError("a reply cannot be read back", retry_after_s=0.1) from None

    def _fail(self, id: str, node: int, code: ErrorCode, reason: str) -> None:
        """An error is the reply to a message."""
        error, now = AppError(code, reason), time.time()
        reply = AppMessage(f"{id}/reply", "", 1, error, reply_to=id, created_at=now, src=node)
        self._hand_in(Letter(records.encode(reply), None, None))

    def _hand_in(self, reply: Letter) -> None:
        self._kept[reply.message.reply_to] = reply
        self._replies.append(reply)
        self._news.set()

    def _forget(self, over: Iterable[Sent[Letter]]) -> None:
        by_site: dict[str, list[str]] = {}
        for sent in over:
            self._kept.pop(sent.id, None)
            if sent.site:
                by_site.setdefault(sent.site, []).append(sent.id)
        for site, ids in by_site.items():
            self._send(site, pb.ServerMessage(app_forget=pb.AppIds(run_id=self.run_id, ids=ids)))
            self._post(site)

    def _has_answered(self, site: str) -> None:
        self._asked.discard(site)
        if not self._asked:
            self._answered.set()
        self._nodes_changed = True
        self._news.set()


def in_short(run: AppRun) -> pb.RunSummary:
    """An app as it is listed beside runs."""
    sites = len(run.exchange.sites)
    nodes = f"{len(run.exchange.nodes())} nodes of {sites} site{'s'[: sites != 1]}"
    away = "" if run.is_attended else "its ServerApp's process is not connected"
    return pb.RunSummary(
        run_id=run.run_id,
        name=run.offer.app,
        status="running" if run.is_attended else "waiting",
        reason=away,
        strategy="Flower app",
        submitted_at=run.submitted_at,
        progress=f"{nodes}, {run.exchange.unanswered} messages without a reply",
    )
