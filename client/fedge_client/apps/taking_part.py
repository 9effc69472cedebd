"""The Flower apps that a site takes part in: messages for its nodes come over its session, and their replies go back.

A link that breaks, or an agent that is started again, costs nothing but the time: what comes again is known by its id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from fedge.errors import FedgeError, RefusedError
from fedge.records import check_settings
from fedge.refusal import Refusal, RefusalCode
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_refusal, printable
from fedge.wire.records import decode_values
from fedge_client.apps.installed import admit
from fedge_client.apps.one_run import OneRun
from fedge_client.apps.states import States
from fedge_client.link import Link
from fedge_client.settings import ClientSettings

log = logging.getLogger(__name__)

APPS: Final = "apps"
MAX_APPS: Final = 16
ASK_S: Final = 60.0
"""How often a site asks what became of an app that it has not been offered again."""

Post = Callable[[pb.ClientMessage], Awaitable[None]]
"""Sends a message when the session has room for it; without a session it is dropped."""


class Apps:
    """All that run here. Its methods belong to the event loop's thread."""

    def __init__(self, settings: ClientSettings, folder: Path, site: str, post: Post) -> None:
        self._settings = settings
        self._folder = folder
        self._site = site
        self._post = post
        self._runs: dict[str, OneRun] = {}
        self._considering = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: asyncio.Task[None] | None = None

    def new_session(self) -> None:
        """The coordinator offers every open app again; one that it does not may be over."""
        for run in self._runs.values():
            run.new_session()
        if self._runs and (self._asking is None or self._asking.done()):
            self._asking = self._begin(self._ask())

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

    async def _ask(self) -> None:
        """What became of apps that are not offered any more: they may have ended while this site was away."""
        while any(not run.is_offered for run in self._runs.values()):
            await asyncio.sleep(ASK_S)
            for run in list(self._runs.values()):
                if not run.is_offered:
                    await self._post(pb.ClientMessage(app_join=pb.AppJoin(run_id=run.run_id)))

    async def _consider(self, offer: pb.AppOffer) -> None:
        """Take part in an app, or refuse it."""
        run_id = offer.run_id
        try:
            async with self._considering:
                run = self._runs.get(run_id) or await self._joined(offer)
            run.is_offered = True
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

    async def _joined(self, offer: pb.AppOffer) -> OneRun:
        """
        Raises:
            RefusedError: this site does not take part.
            FedgeError: it cannot.
        """
        check_settings(decode_values(offer.config))
        where = await asyncio.to_thread(admit, self._settings, offer, folder=self._folder)
        if len(self._runs) >= MAX_APPS:
            why = f"this site takes part in {MAX_APPS} apps already"
            raise RefusedError(Refusal(RefusalCode.TASK_UNAVAILABLE, why))
        in_use = list(self._runs)
        states = await asyncio.to_thread(States, self._folder / APPS, offer.run_id, in_use=in_use)
        run = OneRun(self._settings, offer, where, states, self._site, self._send)
        self._runs[offer.run_id] = run
        log.info("app_joined run=%s app=%s nodes=%d", offer.run_id, offer.app, len(run.nodes))
        return run

    def _send(self, message: pb.ClientMessage) -> None:
        self._begin(self._post(message))

    def _begin(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("app_task_failed", exc_info=error)
