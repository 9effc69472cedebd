"""The site's one outbound connection: gRPC with mutual TLS; a session stream, and bulk in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc import aio

import fedge
from fedge.errors import ConfigError, FedgeError, LinkError, RemoteProtocolError
from fedge.faults import Faults
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.chunks import data_of_chunk, frames
from fedge.wire.limits import APP_CHUNK_BYTES, CHANNEL_OPTIONS, CHUNK_BYTES, PROTOCOL
from fedge.wire.status import RETRY_AFTER, error_of
from fedge_client.download import Download
from fedge_client.identity import Identity

CALL_S = 60.0

_OPTIONS = (
    *CHANNEL_OPTIONS,
    # Keeps NAT entries alive and notices a dead link within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # what decides; a minute unless it is set
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The agent decides when to try again; gRPC's own back-off would hide a coordinator that is back.
    # (Not the minimum: that is also how long an attempt to connect may take, handshake and all.)
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

SessionCall = aio.StreamStreamCall[pb.ClientMessage, pb.ServerMessages]


class Link:
    """A channel to the coordinator under one identity. Its methods raise our errors, never gRPC's."""

    def __init__(
        self,
        server: str,
        *,
        ca_pem: bytes,
        key_pem: bytes,
        certificate_pem: bytes,
        faults: Faults | None = None,
    ) -> None:
        self.server = server
        self.closed = False
        self._faults = faults or Faults()
        credentials = grpc.ssl_channel_credentials(ca_pem, key_pem, certificate_pem)
        self._channel = aio.secure_channel(server, credentials, options=_OPTIONS)
        self._federation: services.FederationAsyncStub = services.FederationStub(self._channel)
        # Bulk passes as bytes: see fedge.wire.chunks.
        name = pb.DESCRIPTOR.services_by_name["Federation"].full_name
        self._fetch: aio.UnaryStreamMultiCallable[pb.FetchRequest, bytes] = self._channel.unary_stream(
            f"/{name}/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=None,
        )
        self._deliver: aio.StreamUnaryMultiCallable[bytes, pb.Receipt] = self._channel.stream_unary(
            f"/{name}/Deliver", request_serializer=None, response_deserializer=pb.Receipt.FromString
        )
        self._enrolment: services.EnrolmentAsyncStub = services.EnrolmentStub(self._channel)

    @classmethod
    def of(cls, server: str, identity: Identity, faults: Faults | None = None) -> Link:
        """The link of an enrolled site."""
        return cls(
            server,
            ca_pem=identity.ca_pem,
            key_pem=identity.key_pem,
            certificate_pem=identity.certificate_pem,
            faults=faults,
        )

    async def close(self) -> None:
        self.closed = True
        await self._channel.close(None)

    async def enrol(self, csr_der: bytes, *, key: bytes, proof: bytes) -> bytes:
        """A certificate (PEM) for a signing request, under the bootstrap identity of a token.

        `key` is the public key with which this site is going to sign, and `proof` what shows that it can.
        """
        request = pb.EnrolRequest(csr=csr_der, identity_key=key, identity_proof=proof)
        with self._errors():
            reply = await self._enrolment.Enrol(request, timeout=CALL_S)
            return reply.certificate

    async def renew(self, csr_der: bytes) -> bytes:
        """The next certificate (PEM) of an enrolled site, which goes on signing with the key that is known."""
        with self._errors():
            reply = await self._federation.Renew(pb.EnrolRequest(csr=csr_der), timeout=CALL_S)
            return reply.certificate

    async def keys(self) -> pb.Directory:
        """The directory of the sites' keys, as the coordinator serves it: unchecked."""
        with self._errors():
            return await self._federation.Keys(pb.DirectoryRequest(), timeout=CALL_S)

    async def open_session(self, *, probe: bool = False) -> tuple[SessionCall, pb.Welcome]:
        """A new session, greeted on both sides; a probe ends there, and takes over no other session."""
        with self._errors():
            call = self._federation.Session()  # type: ignore[call-arg]  # written to, so no iterator
            hello = pb.Hello(protocol=PROTOCOL, software=f"fedge {fedge.__version__}", probe=probe)
            await call.write(pb.ClientMessage(hello=hello))
            first = await call.read()
        # The coordinator greets before it sends anything else, so the welcome comes alone.
        if not isinstance(first, pb.ServerMessages) or len(first.messages) != 1:
            raise RemoteProtocolError("expected a welcome first, found something else")
        if first.messages[0].WhichOneof("kind") != "welcome":
            raise RemoteProtocolError("expected a welcome first, found another message")
        welcome = first.messages[0].welcome
        if welcome.protocol != PROTOCOL:
            raise RemoteProtocolError(f"expected protocol {PROTOCOL}, found {welcome.protocol}")
        return call, welcome

    async def read(self, call: SessionCall) -> AsyncIterator[pb.ServerMessage]:
        """The session's messages until the coordinator ends it."""
        with self._errors():
            while isinstance(batch := await call.read(), pb.ServerMessages):
                for message in batch.messages:
                    yield message

    async def write(self, call: SessionCall, message: pb.ClientMessage) -> None:
        """Send a message in a session.

        Raises:
            LinkError: the session is over.
        """
        try:
            with self._errors():
                await call.write(message)
        except (FedgeError, asyncio.InvalidStateError) as error:
            raise LinkError(f"the session with {self.server} is over: {error}") from None

    async def fetch(self, run_id: str, download: Download) -> None:
        """Fetch what a download lacks still.

        Raises:
            RemoteProtocolError: its size or digest is not what was announced.
            LinkError: the link broke on the way, or the order that named the blob is over by now.
        """
        if download.complete:
            return
        try:
            with self._errors():
                request = pb.FetchRequest(run_id=run_id, digest=download.digest, offset=download.received)
                async for message in self._fetch(request):
                    download.take(data_of_chunk(message))
        except ConfigError as error:
            # An order can end while its model is on the way: nothing is wrong with this site's task.
            raise LinkError(f"what the order named is no longer there: {error}") from None
        download.check()

    async def deliver(
        self, what: pb.Update | pb.AppReply, view: memoryview, *, offset: int = 0
    ) -> pb.Receipt:
        """Send a large update's bytes, or those of a reply, in chunks, from `offset` on; the receipt says whether it
        counts."""
        first = pb.DeliverRequest(offset=offset)
        size = CHUNK_BYTES if isinstance(what, pb.Update) else APP_CHUNK_BYTES
        (first.update if isinstance(what, pb.Update) else first.reply).CopyFrom(what)  # type: ignore[arg-type]  # its own

        def requests() -> Iterator[bytes]:
            yield first.SerializeToString()
            for number, frame in enumerate(frames(view, offset=offset, deliver=True, size=size), 1):
                yield frame
                if 2 * (offset + number * size) >= len(view):
                    self._faults.reach("update.half")

        with self._errors():
            return await self._deliver(requests())

    async def resume(self, what: pb.Update | pb.AppReply) -> int:
        """How many bytes of an update's vector, or of a reply's content, have arrived already."""
        blob = what.vector if isinstance(what, pb.Update) else what.message.content
        request = pb.ResumeRequest(run_id=what.run_id, digest=blob.digest)
        if isinstance(what, pb.Update):
            request.id.CopyFrom(what.id)
        else:
            request.message = what.message.reply_to
        with self._errors():
            reply = await self._federation.Resume(request, timeout=CALL_S)
        if reply.received > blob.size:
            raise RemoteProtocolError(
                f"expected at most {blob.size} bytes to have arrived, found {reply.received}"
            )
        return reply.received

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except aio.AioRpcError as error:
            status, details = error.code().name, error.details() or ""
            wish = _trailing(error, RETRY_AFTER)
            raise error_of(status, details, peer=self.server, retry_after=wish) from None
        except aio.UsageError:
            raise LinkError(f"the link to {self.server} was closed before the call") from None
        except asyncio.CancelledError:
            # gRPC cancels a call whose channel is closed under it. That is a broken link, unless it is
            # this task that is cancelled.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise LinkError(f"the link to {self.server} was closed during the call") from None


def _trailing(error: aio.AioRpcError, wanted: str) -> str | None:
    """What a peer that refused a call has added under this key."""
    pairs: Any = error.trailing_metadata() or ()  # the stubs say that it cannot be iterated over
    return next((str(value) for key, value in pairs if key == wanted), None)
