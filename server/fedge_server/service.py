"""The services that sites call: Session, Fetch, Deliver, Resume, Renew and Keys, and Enrol for those not yet in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from fedge.errors import FedgeError, RemoteProtocolError
from fedge.signing import SignedDirectory
from fedge.wire import fedge_pb2 as pb
from fedge.wire.chunks import frame, frames, open_deliver_request
from fedge.wire.codec import decode_order_id, decode_refusal
from fedge.wire.keys import encode_directory
from fedge.wire.limits import APP_CHUNK_BYTES, CHUNK_BYTES, PROTOCOL
from fedge_server import sessions
from fedge_server.callers import Context, answering, caller, messages, refuse
from fedge_server.clock import now
from fedge_server.coordinator import Coordinator
from fedge_server.deliveries import Deliveries
from fedge_server.driver import RunDriver
from fedge_server.limits import Bucket, Concurrency, Pace
from fedge_server.membership import Membership
from fedge_server.spool import Upload
from fedge_server.witnesses import Witnesses

log = logging.getLogger(__name__)

FIRST_MESSAGE_S = 30.0

MAX_CULPRITS = 256
"""Of those whom a site blames, so many are heard: as many as a sum has members."""

ADMIT_S = 1.0
"""After how long a site may come again that came together with too many others."""

MESSAGES_PER_S = 5000.0
"""What is read of one site's messages, on average: its stream, and then it, waits."""


class FederationService:
    """What enrolled sites may call; `handlers` says which method answers which call."""

    def __init__(
        self, coordinator: Coordinator, membership: Membership, witnesses: Witnesses, *, software: str
    ) -> None:
        self._coordinator = coordinator
        self._membership = membership
        self._witnesses = witnesses
        self._software = software
        self._deliveries = Deliveries(coordinator)
        self._fetches = Concurrency("downloads", each=coordinator.settings.max_site_downloads)
        self._pace = Pace(after_s=ADMIT_S)
        self._directory: tuple[SignedDirectory, bytes] | None = None

    async def Session(
        self, request_iterator: AsyncIterator[pb.ClientMessage | None], context: Context
    ) -> AsyncIterator[pb.ServerMessages]:
        """The site's stream: orders go out the moment they exist, small updates come in."""
        try:
            principal = await caller(context, self._membership, role="site")
            requests = messages(request_iterator)
            hello = await self._greet(requests)
            welcome = self._welcome(await self._witnesses.of(principal.name))
            if hello.probe:
                yield welcome
                return
            self._pace.admit(now=asyncio.get_running_loop().time())
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
            yield welcome
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

    def _welcome(self, witness: bytes) -> pb.ServerMessages:
        federation = self._membership.federation
        welcome = pb.Welcome(
            protocol=PROTOCOL, software=self._software, federation=federation, witness=witness
        )
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
            rate, clock = Bucket(MESSAGES_PER_S, burst=MESSAGES_PER_S), asyncio.get_running_loop().time
            async for message in requests:
                if wait_s := rate.take(1, now=clock()):
                    await asyncio.sleep(wait_s)
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
                culprits = tuple(failed.culprits[:MAX_CULPRITS])
                self._coordinator.fail(session, failed.run_id, order, refusal, culprits)
            case "update":
                receipt = await self._deliveries.inline(session.site, message.update)
                session.send(pb.ServerMessage(receipt=receipt), lazily=not receipt.HasField("refusal"))
            case "progress":
                progress = message.progress
                driver = self._coordinator.runs.get(progress.run_id)
                if driver is not None:
                    driver.progressed(session.site, decode_order_id(progress.id), progress.permille)
            case "advertise" | "share" | "consent" | "reveal" as kind:
                driver = self._coordinator.runs.get(getattr(message, kind).run_id)
                if driver is not None:
                    driver.hear(session.site, message)
            case "app_join":
                self._coordinator.apps.join(session.site, message.app_join)
            case "app_reply":
                self._coordinator.apps.inline(session.site, message.app_reply)
            case "witness":
                self._witnesses.remember(session.site, message.witness.sealed)
            case other:
                raise RemoteProtocolError(f"expected a message of a known kind, found {other}")

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[bytes]:
        """Bytes that the caller's order named, from any offset, as encoded Chunks."""
        try:
            site = (await caller(context, self._membership, role="site")).name
            sent = self._content_of(site, request) or self._vector_of(site, request)
        except FedgeError as error:
            await refuse(context, error)
        try:
            with self._fetches.one_of(site):
                async for frame in sent:
                    yield frame
        except FedgeError as error:
            await refuse(context, error)

    def _content_of(self, site: str, request: pb.FetchRequest) -> AsyncIterator[bytes] | None:
        """What is left of the content of an app's message; None if that is no app's."""
        app = self._coordinator.apps.runs.get(request.run_id)
        if app is None:
            return None
        stored = app.find(site, request.digest)
        if stored is None:
            raise RemoteProtocolError(
                "expected the digest of something that one of the site's messages names"
            )
        return _stored(stored, _offset(request, stored.size))

    def _vector_of(self, site: str, request: pb.FetchRequest) -> AsyncIterator[bytes]:
        driver = self._coordinator.driver(request.run_id)
        view = driver.shelf.find(site, request.digest)
        if view is None:
            raise RemoteProtocolError("expected the digest of something that an open order names")
        return self._frames(site, driver, _offset(request, len(view)), view)

    async def _frames(
        self, site: str, driver: RunDriver, offset: int, view: memoryview
    ) -> AsyncIterator[bytes]:
        """What is left of a vector, in chunks; each that is taken is progress."""
        clock = asyncio.get_running_loop().time
        told = clock()
        starts = range(offset, len(view), CHUNK_BYTES)
        for start, chunk in zip(starts, frames(view, offset=offset), strict=True):
            driver.count(down=min(CHUNK_BYTES, len(view) - start))
            yield chunk
            if clock() - told >= driver.progress_every_s:
                told = clock()
                driver.fetching(site, start, len(view))

    async def Deliver(self, request_iterator: AsyncIterator[bytes], context: Context) -> pb.Receipt:
        """A large update, as encoded DeliverRequests."""
        try:
            site = (await caller(context, self._membership, role="site")).name
            async with asyncio.timeout(FIRST_MESSAGE_S):
                first = open_deliver_request(await anext(request_iterator))
            if not isinstance(first, pb.DeliverRequest):
                raise RemoteProtocolError("expected an update's description first, found bytes")
            if first.HasField("reply"):
                return await self._deliveries.app_reply(site, first, request_iterator)
            return await self._deliveries.in_chunks(site, first, request_iterator)
        except (TimeoutError, StopAsyncIteration):
            await refuse(context, RemoteProtocolError("expected more of the update, found nothing in time"))
        except FedgeError as error:
            await refuse(context, error)

    @answering
    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeReply:
        """How much of an update is here whose delivery was cut off."""
        site = (await caller(context, self._membership, role="site")).name
        return pb.ResumeReply(received=await self._deliveries.resume(site, request))

    @answering
    async def Renew(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolReply:
        """The next certificate of an enrolled site."""
        principal = await caller(context, self._membership, role="site")
        certificate = await self._membership.renew(
            principal, request.csr, key=request.identity_key, proof=request.identity_proof
        )
        log.info("site_renewed site=%s", principal.name)
        return pb.EnrolReply(certificate=certificate)

    @answering
    async def Keys(self, request: pb.DirectoryRequest, context: Context) -> bytes:
        """The newest signed directory of the sites' keys, encoded once for all who ask."""
        site = (await caller(context, self._membership, role="site")).name
        with self._fetches.one_of(site):
            signed = await self._membership.directory()
            if self._directory is None or self._directory[0] is not signed:
                self._directory = (signed, encode_directory(signed).SerializeToString())
            return self._directory[1]


class EnrolmentService:
    """What the holder of a one-time token may call, once."""

    def __init__(self, coordinator: Coordinator, membership: Membership) -> None:
        self._coordinator = coordinator
        self._membership = membership

    @answering
    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolReply:
        """The site's certificate, for its signing request."""
        principal = await caller(context, self._membership, role="enrol")
        certificate = await self._membership.enrol(
            principal, request.csr, key=request.identity_key, proof=request.identity_proof
        )
        session = self._coordinator.sessions.get(principal.name)
        if session is not None:  # its certificate is superseded, and may be in the wrong hands
            session.close("the site was enrolled again")
        log.info("site_enrolled site=%s", principal.name)
        return pb.EnrolReply(certificate=certificate)


def _offset(request: pb.FetchRequest, size: int) -> int:
    """Where in so many bytes a fetch begins."""
    if request.offset > size:
        raise RemoteProtocolError(f"expected an offset up to {size}, found {request.offset}")
    return request.offset


async def _stored(upload: Upload, offset: int) -> AsyncIterator[bytes]:
    """What is left of something in the spool, in chunks."""
    for start in range(offset, upload.size, APP_CHUNK_BYTES):
        yield frame(upload.read(start, min(start + APP_CHUNK_BYTES, upload.size)))
