"""All Flower apps that run on this coordinator, and which sites hear of them."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Final

from fedge.errors import BusyError, ConfigError, FedgeError, RemoteProtocolError, RunError
from fedge.records import APP_NAME, check_settings
from fedge.refusal import Refusal
from fedge.wire import fedge_pb2 as pb
from fedge.wire import records
from fedge.wire.codec import check_blob
from fedge.wire.limits import INLINE_BYTES, check_size, check_text
from fedge_server.apps.app_run import LINGER_S, AppRun, Send
from fedge_server.spool import Spool, Upload

log = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
_MAX_ENDED: Final = 1000
_RUN_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}-[0-9a-f]{8}")


class Switchboard:
    """Apps by the ids of their runs. Its methods belong to the event loop's thread."""

    def __init__(self, spool: Spool, send: Send, *, most: int, is_run: Callable[[str], bool]) -> None:
        """`is_run`: whether an id is that of a run which is no app."""
        self.spool = spool
        self.runs: dict[str, AppRun] = {}
        self._send = send
        self._most = most
        self._is_run = is_run
        self._ended: dict[str, str] = {}
        """Why those ended that ended last."""
        self._began = time.monotonic()
        self._looking: asyncio.Task[None] | None = None

    def open(self, asked: pb.AppOpen, *, admin: str) -> AppRun:
        """The run of an app: a new one, or the one that its process comes back to.

        One that this coordinator does not know, because it was started since, begins again under its old id.

        Raises:
            ConfigError: it is no app.
            RunError: there are as many as the operator allows, or it is another admin's.
        """
        found = self.runs.get(asked.run_id)
        if found is not None:
            if found.admin != admin:
                raise RunError(f"run {asked.run_id} is another admin's")
            return found
        if asked.run_id in self._ended:
            raise RunError(f"run {asked.run_id} was ended: {self._ended[asked.run_id]}")
        if not asked.run_id and len(self.runs) >= self._most:  # one that comes back had its place
            raise RunError(f"this coordinator has its {self._most} open apps; stop one first")
        offer = pb.AppOffer()
        offer.CopyFrom(asked.offer)
        check_settings(records.decode_values(offer.config))
        if not APP_NAME.fullmatch(offer.app) or not offer.version or len(offer.version) > 100:
            raise ConfigError(f"expected an app's publisher/name and version, found {offer.app[:100]!r}")
        if asked.run_id and (not _RUN_ID.fullmatch(asked.run_id) or self._is_run(asked.run_id)):
            raise ConfigError("expected the id of an app's run, as this coordinator gives them")
        offer.run_id = asked.run_id or _new_id(offer.app)
        run = self.runs[offer.run_id] = AppRun(offer, self._send, admin=admin)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="apps")
        return run

    def end(self, run: AppRun, status: str, reason: str) -> None:
        """A run is over: the sites are told, and so is its ServerApp's process."""
        run_id = run.run_id
        if self.runs.get(run_id) is not run:
            return  # it was ended meanwhile
        del self.runs[run_id]
        self._ended[run_id] = reason or status
        while len(self._ended) > _MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        log.info("app_ended run=%s status=%s reason=%s", run_id, status, reason)
        ended = pb.ServerMessage(ended=pb.Ended(run_id=run_id, status=status, reason=reason))
        for site in run.exchange.sites:
            self._send(site, ended)
        run.end(RunError(f"run {run_id} was ended: {reason or status}"))

    def shut_down(self) -> None:
        """Every process is told that the coordinator is going: it may be back."""
        for run in self.runs.values():
            run.end(_GONE)
        if self._looking is not None:
            self._looking.cancel()

    def connect(self, site: str) -> None:
        """A site is there, and is offered every app."""
        for run in self.runs.values():
            run.ask(site)

    def disconnect(self, site: str) -> None:
        for run in self.runs.values():
            run.leave(site)

    def needs(self, site: str) -> bool:
        """Whether a site takes part in an app."""
        return any(run.exchange.is_here(site) for run in self.runs.values())

    def join(self, site: str, joined: pb.AppJoin) -> None:
        """A site takes part in an app, of which it has some messages already; or it asks what became of one.

        Raises:
            RemoteProtocolError: it may not say this.
        """
        run_id = check_text("an id of a run", joined.run_id)
        run = self.runs.get(run_id)
        if run is not None:
            if joined.nodes:  # else it only asks, and has been offered it meanwhile
                run.join(site, joined)
        elif run_id in self._ended or time.monotonic() - self._began > LINGER_S:
            # Before that, its ServerApp's process may still come back to a coordinator that was started again.
            ended = pb.Ended(run_id=run_id, status="ended", reason="no such app runs here")
            self._send(site, pb.ServerMessage(ended=ended))

    def refuse(self, site: str, run_id: str, refusal: Refusal) -> bool:
        """Whether that was an app which a site does not take part in."""
        run = self.runs.get(run_id)
        if run is not None:
            run.refuse(site, refusal)
        return run is not None

    def inline(self, site: str, reply: pb.AppReply) -> None:
        """A site's reply in one message.

        Raises:
            RemoteProtocolError: it is none.
        """
        run = self.runs.get(reply.run_id)
        if run is None:
            return
        message = reply.message
        records.decode(message)
        if message.WhichOneof("body") == "content":
            if not message.content.HasField("inline"):
                raise RemoteProtocolError("expected a reply with its content in it, found none")
            check_size("a reply in one message", message.content.size, INLINE_BYTES)
            check_blob(message.content, expected_bytes=message.content.size)
        elif message.WhichOneof("body") is None:
            raise RemoteProtocolError("expected a reply with content or an error, found neither")
        run.reply(site, message, None)

    @property
    def kept_bytes(self) -> int:
        """Of replies that are stored until they are taken."""
        return sum(run.kept_bytes for run in self.runs.values())

    def stored(self, site: str, reply: pb.AppReply, upload: Upload) -> None:
        """A site's reply whose content has arrived in chunks."""
        run = self.runs.get(reply.run_id)
        if run is not None:
            run.reply(site, reply.message, upload)

    async def _look(self) -> None:
        """Now and then, for as long as there are apps."""
        while self.runs:
            await asyncio.sleep(_LOOK_S)
            for run in list(self.runs.values()):
                try:
                    run.look()
                    if run.deserted:
                        self.end(run, "failed", "its ServerApp's process is gone, and did not come back")
                except Exception:  # a defect: the other apps go on
                    log.exception("app_not_looked_at run=%s", run.run_id)


_GONE: Final[FedgeError] = BusyError("the coordinator is shutting down", retry_after_s=0.5)


def _new_id(app: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", app.partition("/")[2].lower()).strip("-")[:50] or "app"
    return f"{name}-{secrets.token_hex(4)}"
