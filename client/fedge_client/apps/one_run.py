"""One app's run at a site: its messages in, and their replies out, each kept until nobody needs it any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from fedge.errors import FedgeError, LinkError, RemoteProtocolError, StorageError
from fedge.records import AppError, AppMessage, ErrorCode, node_id, reply_to, run_number
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import INLINE_BYTES
from fedge.wire.records import Packed, decode, decode_values, encode
from fedge_client.apps.contents import Contents
from fedge_client.apps.pool import Pool
from fedge_client.apps.process import Setting
from fedge_client.apps.states import States
from fedge_client.link import Link
from fedge_client.settings import ClientSettings
from fedge_client.transfer import Transfers

log = logging.getLogger(__name__)

MAX_ORDERS: Final = 256
MAX_IDS: Final = 4096
STORE_S: Final = 1.0
"""After how long a reply that has not left goes to the disk."""


class OneRun:
    """Its methods belong to the event loop's thread."""

    def __init__(
        self,
        settings: ClientSettings,
        offer: pb.AppOffer,
        where: Path,
        states: States,
        site: str,
        send: Callable[[pb.ClientMessage], None],
    ) -> None:
        self.run_id = offer.run_id
        self.is_offered = True
        """Whether the coordinator has offered it in this session."""
        self.nodes = {node_id(site, at): config for at, config in enumerate(settings.flower.nodes)}
        self._limits = settings.policy.limits
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._states = states
        self._contents = Contents(offer.run_id, most=settings.flower.processes + 1)
        setting = Setting(
            folder=str(where.resolve()),
            run_id=run_number(offer.run_id),
            config=decode_values(offer.config),
            discreet=True,
            threads=settings.worker.threads or 1,
            load_s=settings.worker.hang_s,
            memory_mb=settings.worker.memory_mb,
        )
        self._pool = Pool(
            setting,
            self.nodes,
            workers=settings.flower.processes,
            answered=self._answered,
            memory=states,
            warm=True,
        )
        self._under_way: dict[str, asyncio.Task[None] | None] = {}
        """Messages without a reply, and what brings their contents here."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._failed: dict[str, Packed] = {}
        """Replies that are errors of which the states know nothing."""
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._to_store: list[str] = []
        self._storing: asyncio.Task[None] | None = None
        self._holds = True
        self._link: Link | None = None

    @property
    def ids(self) -> list[str]:
        """The messages that this site is at, and those whose replies it has."""
        return [*{*self._under_way, *self._failed, *self._states.ids}][:MAX_IDS]

    def new_session(self) -> None:
        """Nothing is handed in until the coordinator has said what it wants; what was on its way here comes again."""
        self._holds, self.is_offered = True, False
        for task in self._sending.values():
            task.cancel()
        self._sending.clear()
        for id, fetching in list(self._under_way.items()):
            if fetching is not None:
                self._over(id)
                fetching.cancel()

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
        if len(self._under_way) >= MAX_ORDERS:
            raise RemoteProtocolError(f"expected at most {MAX_ORDERS} messages of an app at once, found more")
        self._states.rewind(about.node, about.id)  # if its reply was lost with an earlier process
        self._timers[about.id] = self._loop.call_later(max(0.0, order.left_s), self._drop, about.id)
        self._under_way[about.id] = asyncio.create_task(self._take(about, order.message.content, link))

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
        for task in [*self._under_way.values(), *self._sending.values(), self._storing]:
            if task is not None:
                task.cancel()
        for timer in self._timers.values():
            timer.cancel()
        await asyncio.to_thread(self._pool.close)
        await asyncio.to_thread(self._states.close if for_good else self._store)

    # Messages.

    async def _take(self, about: AppMessage, blob: pb.Blob, link: Link) -> None:
        """Fetch what a message has, and give it to its node."""
        id = about.id
        try:
            self._limits.check_model(blob.size)
            payload = await self._contents.fetch(id, blob, link)
        except LinkError as error:
            log.warning("app_message_interrupted run=%s reason=%s", self.run_id, error)
            self._over(id)  # it comes again with the next session
        except (FedgeError, MemoryError) as error:
            log.error("app_message_not_taken run=%s reason=%s: %s", self.run_id, type(error).__name__, error)
            self._over(id)
            self._fail(about, f"the site could not take the message: {type(error).__name__}")
        else:
            self._under_way[id] = None
            told = (self.run_id, about.node, about.kind, blob.size)
            log.info("app_message run=%s node=%d kind=%s bytes=%d", *told)
            self._pool.give(Packed(about, (payload,)))

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
        self._contents.release(id)
        if (timer := self._timers.pop(id, None)) is not None:
            timer.cancel()

    # Replies.

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

    def _fail(self, asked: AppMessage, reason: str) -> None:
        """There will be no other reply than this."""
        error = AppError(ErrorCode.UNKNOWN, reason)
        self._failed[asked.id] = Packed(reply_to(asked, error, now=time.time()))
        self._hand_in(asked.id)

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
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, LinkError):  # it goes out with the next session
            log.info("app_reply_interrupted run=%s reason=%s", self.run_id, error)
            return
        log.error("app_reply_not_sent run=%s reason=%s", self.run_id, error)
        if id not in self._failed:
            self._fail(
                AppMessage(id, "", 1, {}), f"the site could not hand in its reply: {type(error).__name__}"
            )

    async def _deliver(self, id: str, reply: Packed | None, link: Link) -> None:
        reply = reply or self._failed.get(id) or await asyncio.to_thread(self._states.reply, id)
        if reply is None:
            raise StorageError("a reply that was kept cannot be read back")
        blob = await asyncio.to_thread(reply.blob) if reply.size > INLINE_BYTES else reply.blob()
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
