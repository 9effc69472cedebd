"""What the process of a ServerApp says to the coordinator: each message is checked before it counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Final

from fedge.errors import FedgeError, LinkError, RefusedError, RemoteProtocolError
from fedge.wire import fedge_pb2 as pb
from fedge.wire.chunks import Piece
from fedge.wire.codec import check_blob, printable, shorten
from fedge.wire.limits import INLINE_BYTES, Limits, check_size
from fedge_server.apps.app_run import AppRun
from fedge_server.apps.switchboard import Switchboard
from fedge_server.spool import Upload

log = logging.getLogger(__name__)

FIRST_S: Final = 30.0
DATA_S: Final = 300.0
"""Between two chunks of one content."""

_ON_LOOP_BYTES: Final = 128 << 10


Request = pb.AppRequest | Piece | None
"""Of a ServerApp's process: bytes are of the content that was announced last; None is none that can be read."""


def _kind_of(request: Request) -> str:
    if isinstance(request, pb.AppRequest):
        return str(request.WhichOneof("kind"))
    return "data" if request is not None else "what cannot be read"


class Conversation:
    """One stream of a ServerApp's process."""

    def __init__(
        self, apps: Switchboard, requests: AsyncIterator[Request], limits: Limits, *, admin: str
    ) -> None:
        self._apps = apps
        self._requests = requests
        self._limits = limits
        self._admin = admin
        self._failed: FedgeError | None = None
        self._closed = False

    async def run(self, sites: Callable[[], Iterable[str]]) -> AsyncIterator[pb.AppEvent | bytes]:
        """Events for the process, some of them encoded, until it ends its stream; `sites` are those that are there when
        it is asked.

        Raises:
            FedgeError: it said something that it may not, or its app was ended.
        """
        try:
            first = await asyncio.wait_for(anext(self._requests), FIRST_S)
        except (TimeoutError, StopAsyncIteration):
            raise RemoteProtocolError("expected an app first, found nothing") from None
        if not isinstance(first, pb.AppRequest) or first.WhichOneof("kind") != "open":
            raise RemoteProtocolError(f"expected an app first, found {_kind_of(first)}")
        is_new = first.open.run_id not in self._apps.runs
        app = self._apps.open(first.open, admin=self._admin)
        app.attach(self, first.open.waiting)
        reader = asyncio.create_task(self._read(app), name=f"app {app.run_id}")
        try:
            if is_new:
                log.info("app_opened run=%s app=%s admin=%s", app.run_id, app.offer.app, self._admin)
                for site in sites():
                    app.ask(site)
                await app.answers()
            yield pb.AppEvent(opened=pb.AppOpened(run_id=app.run_id))
            async for event in app.events(self):
                yield event
        except FedgeError as error:
            if not self._closed:
                raise self._failed or error from None
        finally:
            app.detach(self)
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    async def _read(self, app: AppRun) -> None:
        try:
            async for request in self._requests:
                if not await self._do(app, request):
                    return
            log.warning("app_link_ended run=%s: its ServerApp's process may come back", app.run_id)
            self._stop(app, LinkError("its stream has ended"))
        except FedgeError as error:
            log.warning("app_refused_its_process run=%s reason=%s", app.run_id, error)
            self._stop(app, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("app_crashed run=%s", app.run_id)
            self._stop(app, RemoteProtocolError("internal error"))

    async def _do(self, app: AppRun, request: Request) -> bool:
        """False once that was the last."""
        if not isinstance(request, pb.AppRequest):
            raise RemoteProtocolError(f"expected messages, or which are over, found {_kind_of(request)}")
        match request.WhichOneof("kind"):
            case "send":
                stored = await self._content(request.send.content)
                app.send(request.send.messages, request.send.content, stored)
            case "forget":
                app.forget(request.forget.ids)
            case "close":
                failed, self._closed = printable(shorten(request.close.failed)), True
                self._apps.end(app, "failed" if failed else "done", failed)
                return False
            case other:
                raise RemoteProtocolError(f"expected messages, or which are over, found {other}")
        return True

    async def _content(self, blob: pb.Blob) -> Upload | None:
        """What follows a send, unless it is inline."""
        self._limits.check_model(blob.size)
        check_blob(blob, expected_bytes=blob.size)
        if blob.HasField("inline"):
            check_size("content in one message", blob.size, INLINE_BYTES)
            return None
        upload = self._apps.spool.upload(size=blob.size, digest=blob.digest, masked=True)
        while upload.missing:
            try:
                async with asyncio.timeout(DATA_S):
                    request = await anext(self._requests, None)
            except TimeoutError:
                raise RemoteProtocolError(
                    f"expected {upload.missing} more bytes, found none in time"
                ) from None
            if not isinstance(request, bytes | memoryview):
                raise RemoteProtocolError(
                    f"expected {upload.missing} more bytes of content, found something else"
                )
            try:
                if len(request) <= _ON_LOOP_BYTES:
                    upload.write(request)
                else:
                    await asyncio.to_thread(upload.write, request)
                if not upload.missing:
                    upload.finish()
            except RefusedError as error:
                raise RemoteProtocolError(str(error)) from None
        return upload

    def _stop(self, app: AppRun, error: FedgeError) -> None:
        """This stream is over; the app waits for another."""
        self._failed = error
        app.detach(self)
        app.wake()
