"""The services that sites call: Session, Fetch, Deliver and Renew, and Enrol for those not yet in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from fedge.errors import FedgeError, RefusedError, RemoteProtocolError
from fedge.exact import MAX_WEIGHT
from fedge.refusal import Refusal, RefusalCode
from fedge.round import OrderId
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.chunks import Piece, frames, open_deliver_request
from fedge.wire.codec import (
    check_blob,
    decode_metrics,
    decode_order_id,
    decode_refusal,
    encode_order_id,
    encode_refusal,
    printable,
    shorten,
)
from fedge.wire.limits import CHUNK_BYTES, MAX_MESSAGE_BYTES, PROTOCOL
from fedge_server import sessions
from fedge_server.callers import Context, answering, caller, messages, refuse
from fedge_server.clock import now
from fedge_server.coordinator import Coordinator
from fedge_server.driver import RunDriver
from fedge_server.membership import Membership
from fedge_server.spool import Upload

log = logging.getLogger(__name__)

_INLINE_ON_LOOP_BYTES = 128 << 10
FIRST_MESSAGE_S = 30.0
CHUNK_WAIT_S = 120.0


class FederationService:
    """What enrolled sites may call; `handlers` says which method answers which call."""

    def __init__(self, coordinator: Coordinator, membership: Membership, *, software: str) -> None:
        self._coordinator = coordinator
        self._membership = membership
        self._software = software

    async def Session(
        self, request_iterator: AsyncIterator[pb.ClientMessage], context: Context
    ) -> AsyncIterator[pb.ServerMessages]:
        """The site's stream: orders go out the moment they exist, small updates come in."""
        try:
            principal = await caller(context, self._membership, role="site")
            requests = messages(request_iterator)
            hello = await self._greet(requests)
            if hello.probe:
                yield self._welcome()
                return
            self._membership.check_known(principal)  # it may have been revoked while it greeted
            session = sessions.Session(principal)
            self._coordinator.connect(session)
        except FedgeError as error:
            await refuse(context, error)
        reader = asyncio.create_task(self._read(session, requests), name=f"session {session.site}")
        expiry = asyncio.get_running_loop().call_later(
            max(0.0, (principal.not_after - now()).total_seconds()),
            session.close,
            "the site's certificate has expired",
        )
        try:
            yield self._welcome()
            async for batch in session.outgoing():
                yield pb.ServerMessages(messages=batch)
        finally:
            expiry.cancel()
            session.close("the site ended its stream")
            self._coordinator.disconnect(session)
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader
        if session.error is not None:
            await refuse(context, session.error)

    def _welcome(self) -> pb.ServerMessages:
        federation = self._membership.federation
        welcome = pb.Welcome(protocol=PROTOCOL, software=self._software, federation=federation)
        return pb.ServerMessages(messages=[pb.ServerMessage(welcome=welcome)])

    async def _greet(self, requests: AsyncIterator[pb.ClientMessage]) -> pb.Hello:
        try:
            first = await asyncio.wait_for(anext(requests), FIRST_MESSAGE_S)
        except (TimeoutError, StopAsyncIteration):
            raise RemoteProtocolError("expected a hello first, found nothing") from None
        if first.WhichOneof("kind") != "hello" or first.hello.protocol != PROTOCOL:
            raise RemoteProtocolError(
                f"expected a hello of protocol {PROTOCOL}, found {first.WhichOneof('kind')} "
                f"of protocol {first.hello.protocol}: site and coordinator need matching versions of fedge"
            )
        return first.hello

    async def _read(self, session: sessions.Session, requests: AsyncIterator[pb.ClientMessage]) -> None:
        """Handle what the site sends until it stops; a message that breaks the protocol ends the session."""
        try:
            async for message in requests:
                if session.closed:
                    return  # what comes after must not be done in its name
                self._membership.check_known(session.principal)
                await self._handle(session, message)
            session.close("the site ended its stream")
        except RemoteProtocolError as error:
            log.warning("session_refused site=%s reason=%s", session.site, error)
            session.error = error
            session.close(str(error))
        except FedgeError as error:  # the site's next session is told by `caller`
            log.warning("session_refused site=%s reason=%s", session.site, error)
            session.close(str(error))
        except Exception:
            log.exception("session_crashed site=%s", session.site)
            session.close("internal error")
            raise

    async def _handle(self, session: sessions.Session, message: pb.ClientMessage) -> None:
        match message.WhichOneof("kind"):
            case "accept":
                self._coordinator.accept(session, message.accept.run_id)
            case "refuse":
                refusal = decode_refusal(message.refuse.refusal)
                self._coordinator.refuse(session, message.refuse.run_id, refusal)
            case "failed":
                failed = message.failed
                order, refusal = decode_order_id(failed.id), decode_refusal(failed.refusal)
                self._coordinator.fail(session, failed.run_id, order, refusal)
            case "update":
                receipt = await self._inline_update(session, message.update)
                session.send(pb.ServerMessage(receipt=receipt), lazily=not receipt.HasField("refusal"))
            case other:
                raise RemoteProtocolError(f"expected a message of a known kind, found {other}")

    async def _inline_update(self, session: sessions.Session, update: pb.Update) -> pb.Receipt:
        order = decode_order_id(update.id)
        try:
            driver, upload = self._begin(session.site, order, update)
            if not update.vector.HasField("inline"):
                raise _refused(RefusalCode.WRONG_LENGTH, "expected an update with its vector in it")
            try:
                if upload is not None:
                    await _write(upload, update.vector.inline)
                    upload.finish()
            except BaseException:
                if upload is not None:
                    upload.close()
                raise
            outcome = await driver.deliver(session.site, order, update, upload)
        except RefusedError as error:
            self._count_refusal(session.site, update.run_id, order, error.refusal)
            outcome = error.refusal
        return _receipt(update, outcome)

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[bytes]:
        """Bytes that the caller's order named, from any offset, as encoded Chunks."""
        try:
            site = (await caller(context, self._membership, role="site")).name
            driver = self._coordinator.driver(request.run_id)
            view = driver.shelf.find(site, request.digest)
            if view is None:
                raise RemoteProtocolError("expected the digest of something that an open order names")
            if request.offset > len(view):
                raise RemoteProtocolError(f"expected an offset up to {len(view)}, found {request.offset}")
        except FedgeError as error:
            await refuse(context, error)
        starts = range(request.offset, len(view), CHUNK_BYTES)
        for start, frame in zip(starts, frames(view, offset=request.offset), strict=True):
            driver.count(down=min(CHUNK_BYTES, len(view) - start))
            yield frame

    async def Deliver(self, request_iterator: AsyncIterator[bytes], context: Context) -> pb.Receipt:
        """A large update, as encoded DeliverRequests. One that cannot count is answered before it is read."""
        try:
            site = (await caller(context, self._membership, role="site")).name
            async with asyncio.timeout(FIRST_MESSAGE_S):
                update = open_deliver_request(await anext(request_iterator))
            if not isinstance(update, pb.Update):
                raise RemoteProtocolError("expected an update's description first, found bytes")
            return await self._receive(site, update, request_iterator)
        except (TimeoutError, StopAsyncIteration):
            await refuse(context, RemoteProtocolError("expected more of the update, found nothing in time"))
        except FedgeError as error:
            await refuse(context, error)

    async def _receive(self, site: str, update: pb.Update, requests: AsyncIterator[bytes]) -> pb.Receipt:
        order = decode_order_id(update.id)
        try:
            driver, upload = self._begin(site, order, update)
            if upload is None:
                raise _refused(RefusalCode.WRONG_LENGTH, "expected an update with a vector")
            try:
                await _fill(upload, requests)
                if upload.missing:
                    # A link that broke looks like this, too: it is not held against the site, which may retry.
                    raise RemoteProtocolError(f"expected {upload.missing} more bytes, found the end")
                upload.finish()
            except BaseException:
                upload.close()
                raise
            outcome = await driver.deliver(site, order, update, upload)
        except RefusedError as error:
            self._count_refusal(site, update.run_id, order, error.refusal)
            outcome = error.refusal
        return _receipt(update, outcome)

    def _begin(self, site: str, order: OrderId, update: pb.Update) -> tuple[RunDriver, Upload | None]:
        """Check everything that an update says of itself, before its bytes are read or room is made."""
        driver = self._coordinator.runs.get(update.run_id)
        if driver is None and update.run_id in self._coordinator.past:
            raise _refused(RefusalCode.RUN_ENDED, "the run is over")
        if driver is None:
            raise _refused(RefusalCode.UNKNOWN_RUN, "no such run here")
        unwanted = driver.unwanted(site, order)
        if unwanted is not None:
            raise RefusedError(unwanted)
        if not 1 <= update.num_examples < MAX_WEIGHT:
            raise _refused(
                RefusalCode.BAD_WEIGHT,
                f"expected 1 to {MAX_WEIGHT - 1} examples, found {update.num_examples}",
            )
        try:
            decode_metrics(update.metrics)
        except RemoteProtocolError as error:
            raise _refused(RefusalCode.BAD_METRICS, str(error)) from None
        expected = 0 if order.kind == "evaluate" else driver.layout.nbytes
        if update.vector.size != expected:
            raise _refused(
                RefusalCode.WRONG_LENGTH, f"expected a vector of {expected} bytes, found {update.vector.size}"
            )
        try:
            check_blob(update.vector, expected_bytes=expected)
        except RemoteProtocolError as error:
            raise _refused(RefusalCode.WRONG_DIGEST, str(error)) from None
        if not expected:
            return driver, None
        return driver, self._coordinator.spool.upload(size=expected, digest=update.vector.digest)

    def _count_refusal(self, site: str, run_id: str, order: OrderId, refusal: Refusal) -> None:
        """A refused update costs the site its part in this round, unless it merely came late or twice."""
        named = printable(shorten(run_id, cap=100))  # the site's words: it may be no run's id at all
        log.warning("update_refused run=%s site=%s order=%s reason=%s", named, site, order, refusal)
        session = self._coordinator.sessions.get(site)
        if session is not None and refusal.code not in _HARMLESS:
            self._coordinator.fail(session, run_id, order, refusal)

    @answering
    async def Renew(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolReply:
        """The next certificate of an enrolled site."""
        principal = await caller(context, self._membership, role="site")
        certificate = await self._membership.renew(principal, request.csr)
        log.info("site_renewed site=%s", principal.name)
        return pb.EnrolReply(certificate=certificate)


class EnrolmentService(services.EnrolmentServicer):
    """What the holder of a one-time token may call, once."""

    def __init__(self, coordinator: Coordinator, membership: Membership) -> None:
        self._coordinator = coordinator
        self._membership = membership

    @answering
    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolReply:
        """The site's certificate, for its signing request."""
        principal = await caller(context, self._membership, role="enrol")
        certificate = await self._membership.enrol(principal, request.csr)
        session = self._coordinator.sessions.get(principal.name)
        if session is not None:  # its certificate is superseded, and may be in the wrong hands
            session.close("the site was enrolled again")
        log.info("site_enrolled site=%s", principal.name)
        return pb.EnrolReply(certificate=certificate)


_HARMLESS = frozenset(
    {
        RefusalCode.LATE,
        RefusalCode.DUPLICATE,
        RefusalCode.NOT_ASKED,
        RefusalCode.STALE,
        RefusalCode.RUN_ENDED,
        RefusalCode.UNKNOWN_RUN,
    }
)


async def _fill(upload: Upload, requests: AsyncIterator[bytes]) -> None:
    """Keep what arrives until the sender ends; while one chunk is written the next is on its way."""
    writing: asyncio.Task[None] | None = None
    try:
        while True:
            async with asyncio.timeout(CHUNK_WAIT_S):
                request = await anext(requests, None)
            if writing is not None:
                await writing
            if request is None:
                return
            data = open_deliver_request(request)
            if isinstance(data, pb.Update):
                raise RemoteProtocolError("expected bytes of the update, found another update")
            writing = asyncio.create_task(_write(upload, data))
    finally:
        if writing is not None:
            writing.cancel()
            with suppress(asyncio.CancelledError, FedgeError):  # what ends the upload is the first trouble
                await writing


async def _write(upload: Upload, data: Piece) -> None:
    """Hash, check and keep a chunk; on a thread when it is large, so that the loop stays free."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise _refused(RefusalCode.TOO_LARGE, f"expected chunks of at most {MAX_MESSAGE_BYTES} bytes")
    if len(data) <= _INLINE_ON_LOOP_BYTES:
        upload.write(data)
    else:
        await asyncio.to_thread(upload.write, data)


def _receipt(update: pb.Update, outcome: Refusal | None) -> pb.Receipt:
    return pb.Receipt(
        run_id=update.run_id,
        id=encode_order_id(decode_order_id(update.id)),
        refusal=encode_refusal(outcome) if outcome is not None else None,
    )


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
