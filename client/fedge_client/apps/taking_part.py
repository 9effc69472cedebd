"""The Flower apps that a site takes part in: messages for its nodes come over its session, and their replies go back.

A reply is kept until the coordinator says that nobody needs it any more. A link that breaks, or an agent that is
started again, costs nothing but the time: what comes again is known by its id.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np

from fedge.errors import FedgeError, LinkError, RefusedError, RemoteProtocolError, StorageError
from fedge.records import AppError, AppMessage, ErrorCode, node_id, reply_to, run_number
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import bytes_of, new_digest
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_refusal, printable
from fedge.wire.limits import INLINE_BYTES
from fedge.wire.records import Packed, decode, decode_values, encode
from fedge_client.apps.installed import admit
from fedge_client.apps.pool import Pool
from fedge_client.apps.process import Setting
from fedge_client.apps.states import States
from fedge_client.download import Download
from fedge_client.link import Link
from fedge_client.settings import ClientSettings
from fedge_client.transfer import Transfers

log = logging.getLogger(__name__)

APPS: Final = "apps"
MAX_APPS: Final = 16
STORE_S: Final = 1.0

Post = Callable[[pb.ClientMessage], Awaitable[None]]
"""Sends a message when the session has room for it; without a session it is dropped."""


class Apps:
    """All that run here. Its methods belong to the event loop's thread."""

    def __init__(self, settings: ClientSettings, folder: Path, site: str, post: Post) -> None:
        self._settings = settings
        self._folder = folder
        self._site = site
        self._post = post
        self._runs: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def hear(self, message: pb.ServerMessage, link: Link) -> None:
        """A message of the session.

        Raises:
            RemoteProtocolError: it is none that a coordinator may send.
        """
        match message.WhichOneof("kind"):
            case "app_offer":
                self._begin(self._consider(message.app_offer))
            case "app_order":
                run = self._runs.get(message.app_order.run_id)
                if run is not None:
                    run.order(message.app_order, link)
            case "app_forget":
                run = self._runs.get(message.app_forget.run_id)
                if run is not None:
                    run.forget(message.app_forget.ids, link)

    def ended(self, run_id: str) -> None:
        """An app is over; what it has kept here goes with it."""
        run = self._runs.pop(run_id, None)
        if run is not None:
            self._begin(run.close(for_good=True))

    async def close(self) -> None:
        """This agent ends: so do all processes. What was kept stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(run.close() for run in self._runs.values()))

    async def _consider(self, offer: pb.AppOffer) -> None:
        """Take part in an app, or refuse it."""
        run_id = offer.run_id
        try:
            run = self._runs.get(run_id)
            if run is None:
                where = await asyncio.to_thread(admit, self._settings, offer, folder=self._folder)
                run = self._runs.get(run_id)  # it may have been offered again meanwhile
            if run is None:
                if len(self._runs) >= MAX_APPS:
                    why = f"this site takes part in {MAX_APPS} apps already"
                    raise RefusedError(Refusal(RefusalCode.TASK_UNAVAILABLE, why))
                run = _Run(self._settings, offer, where, self._folder / APPS, self._site, self._spawn_post)
                self._runs[run_id] = run
                log.info("app_joined run=%s app=%s nodes=%d", run_id, offer.app, len(run.nodes))
            run.hold()
            join = pb.AppJoin(run_id=run_id, nodes=len(run.nodes), ids=run.ids)
            await self._post(pb.ClientMessage(app_join=join))
        except FedgeError as error:
            refusal = Refusal(RefusalCode.TASK_UNAVAILABLE, f"{type(error).__name__}: see the site's log")
            if isinstance(error, RefusedError):
                refusal = error.refusal
            why = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            log.warning("app_refused run=%s reason=%s", printable(run_id)[:100], why)
            refuse = pb.Refuse(run_id=run_id, refusal=encode_refusal(refusal))
            await self._post(pb.ClientMessage(refuse=refuse))

    def _spawn_post(self, message: pb.ClientMessage) -> None:
        self._begin(self._post(message))

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("app_task_failed", exc_info=error)


class _Run:
    """One app's run."""

    def __init__(
        self,
        settings: ClientSettings,
        offer: pb.AppOffer,
        where: Path,
        folder: Path,
        site: str,
        send: Callable[[pb.ClientMessage], None],
    ) -> None:
        self.run_id = offer.run_id
        self._limits = settings.policy.limits
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._states = States(folder, offer.run_id)
        self.nodes = {node_id(site, at): config for at, config in enumerate(settings.flower.nodes)}
        setting = Setting(
            folder=str(where.resolve()),
            run_id=run_number(offer.run_id),
            config=decode_values(offer.config),
            discreet=True,
            threads=settings.worker.threads or 1,
            memory_mb=settings.worker.memory_mb,
        )
        self._pool = Pool(
            setting,
            self.nodes,
            workers=settings.flower.processes,
            answered=self._answered,
            memory=self._states,
            warm=True,
        )
        self._under_way: dict[str, asyncio.Task[None] | None] = {}
        """Messages without a reply, and their transfers."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._failed: dict[str, Packed] = {}
        """Replies that are errors of which the states know nothing."""
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._to_store: list[str] = []
        """Messages whose replies go to the disk if they are still here in a moment."""
        self._storing: asyncio.Task[None] | None = None
        self._holds = False
        self._link: Link | None = None

    @property
    def ids(self) -> list[str]:
        """The messages that this site is at, and those whose replies it has."""
        return [*{*self._under_way, *self._failed, *self._states.ids}]

    def hold(self) -> None:
        """A new session: nothing is handed in until the coordinator has said what it wants."""
        self._holds = True
        for task in self._sending.values():
            task.cancel()
        self._sending.clear()

    def order(self, order: pb.AppOrder, link: Link) -> None:
        """A message for a node.

        Raises:
            RemoteProtocolError: it is none.
        """
        about, self._link = decode(order.message), link
        if about.node not in self.nodes:
            raise RemoteProtocolError("expected a message for a node of this site, found another's")
        if about.id in self._under_way:
            return
        if about.id in self._failed or about.id in self._states.ids:
            self._hand_in(about.id)
            return
        self._states.rewind(about.node, about.id)  # if its reply was lost with an earlier process
        self._timers[about.id] = self._loop.call_later(max(0.0, order.left_s), self._drop, about.id)
        self._under_way[about.id] = asyncio.create_task(self._take(order.message, link))

    def forget(self, ids: Iterable[str], link: Link) -> None:
        """Nobody needs what comes of these. After a break, that is said first, and then the others go out."""
        self._link = link
        for id in ids:
            self._drop(id)
            self._failed.pop(id, None)
            self._states.forget(id)
            if (task := self._sending.pop(id, None)) is not None:
                task.cancel()
        if self._holds:
            self._holds = False
            for id in {*self._failed, *self._states.ids}:
                self._hand_in(id)

    async def close(self, *, for_good: bool = False) -> None:
        """Nobody works for it any more; `for_good`: nothing is kept either."""
        for task in [*self._under_way.values(), *self._sending.values()]:
            if task is not None:
                task.cancel()
        for timer in self._timers.values():
            timer.cancel()
        if self._storing is not None:
            self._storing.cancel()
        await asyncio.to_thread(self._pool.close)
        await asyncio.to_thread(self._states.close if for_good else self._store)

    async def _take(self, message: pb.AppMessage, link: Link) -> None:
        """Fetch what a message has, and give it to its node."""
        id, blob, about = message.id, message.content, decode(message)
        try:
            self._limits.check_model(blob.size)
            payload = np.empty(blob.size, np.uint8)
            download = Download(blob, payload)
            await Transfers().insist(link, lambda: link.fetch(self.run_id, download))
            self._under_way[id] = None
            log.info(
                "app_message run=%s node=%d kind=%s bytes=%d",
                self.run_id,
                message.node,
                message.kind,
                blob.size,
            )
            self._pool.give(Packed(about, (bytes_of(payload),)))
        except LinkError as error:
            log.warning("app_message_interrupted run=%s reason=%s", self.run_id, error)
            self._over(id)  # it comes again with the next session
        except (FedgeError, MemoryError) as error:
            log.error("app_message_not_taken run=%s reason=%s: %s", self.run_id, type(error).__name__, error)
            self._over(id)
            self._fail(about, f"the site could not take the message: {type(error).__name__}")

    def _fail(self, asked: AppMessage, reason: str) -> None:
        """There will be no other reply than this."""
        error = AppError(ErrorCode.UNKNOWN, reason)
        self._failed[asked.id] = Packed(reply_to(asked, error, now=time.time()))
        self._hand_in(asked.id)

    def _answered(self, reply: Packed) -> None:
        """On a thread of the pool."""
        self._loop.call_soon_threadsafe(self._has, reply)

    def _has(self, reply: Packed) -> None:
        id = reply.about.reply_to
        if id not in self._under_way:  # it was called off
            self._states.forget(id)
            return
        self._over(id)
        if id in self._states.ids:
            self._to_store.append(id)
            if self._storing is None or self._storing.done():
                self._storing = asyncio.create_task(self._store_late_ones())
        else:
            self._failed[id] = reply
        self._hand_in(id, reply)

    async def _store_late_ones(self) -> None:
        """Replies that do not leave at once go to the disk: their link is slow or broken, and they are much work."""
        while self._to_store:
            ids, self._to_store = self._to_store, []
            await asyncio.sleep(STORE_S)
            await asyncio.to_thread(self._store, ids)

    def _store(self, ids: Iterable[str] | None = None) -> None:
        try:
            self._states.store(ids)
        except StorageError as error:  # without it, the work would be done again after a crash
            log.error("app_reply_not_kept run=%s reason=%s", self.run_id, error)

    def _hand_in(self, id: str, reply: Packed | None = None) -> None:
        if self._holds or self._link is None or id in self._sending:
            return
        task = asyncio.create_task(self._deliver(id, reply, self._link))
        self._sending[id] = task
        task.add_done_callback(lambda done: self._sent(id, done))

    def _sent(self, id: str, task: asyncio.Task[None]) -> None:
        if self._sending.get(id) is task:
            del self._sending[id]
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, LinkError):  # it goes out with the next session
                log.info("app_reply_interrupted run=%s reason=%s", self.run_id, error)
                return
            log.error("app_reply_not_sent run=%s reason=%s", self.run_id, error)
            if id not in self._failed:
                what = f"the site could not hand in its reply: {type(error).__name__}"
                self._fail(AppMessage(id, "", 1, {}), what)

    async def _deliver(self, id: str, reply: Packed | None, link: Link) -> None:
        if reply is None:
            reply = self._failed.get(id) or await asyncio.to_thread(self._states.reply, id)
        if reply is None:
            return
        blob = await asyncio.to_thread(_blob_of, reply) if reply.size > INLINE_BYTES else _blob_of(reply)
        message = pb.AppReply(run_id=self.run_id, message=encode(reply.about, blob))
        log.info("app_reply run=%s node=%d bytes=%d", self.run_id, reply.about.src, reply.size)
        if blob is None or blob.HasField("inline"):
            self._send(pb.ClientMessage(app_reply=message))
            return
        (payload,), first = reply.payload, True

        async def attempt() -> None:
            nonlocal first
            offset = 0 if first else await link.resume(message)
            first = False
            await link.deliver(message, memoryview(payload), offset=offset)

        await Transfers().insist(link, attempt)

    def _drop(self, id: str) -> None:
        """Nobody waits for a message's reply, or its time is over."""
        if id in self._under_way:
            task = self._under_way[id]
            self._over(id)
            if task is not None:
                task.cancel()
            self._pool.drop([id])

    def _over(self, id: str) -> None:
        self._under_way.pop(id, None)
        if (timer := self._timers.pop(id, None)) is not None:
            timer.cancel()


def _blob_of(reply: Packed) -> pb.Blob | None:
    """What is said of a reply's content; None if it has none."""
    if isinstance(reply.about.content, AppError):
        return None
    digest = new_digest()
    for part in reply.payload:
        digest.update(part)
    inline = b"".join(reply.payload) if reply.size <= INLINE_BYTES else None
    return pb.Blob(digest=digest.digest(), size=reply.size, inline=inline)
