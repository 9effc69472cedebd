"""The link, against a coordinator of a few lines: bulk in chunks, and errors that are ours, never gRPC's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from fedge.errors import FedgeError, IdentityError, LimitError, LinkError, RemoteProtocolError
from fedge.vector import Array, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.codec import encode_blob
from fedge.wire.limits import CHUNK_BYTES, PROTOCOL
from fedge_client.download import Download
from fedge_client.link import Link

VECTOR: Array = np.random.default_rng(0).normal(size=CHUNK_BYTES // 2 + 3).astype(np.float32)
BLOB = encode_blob(bytes_of(VECTOR))


@dataclass
class Coordinator(services.FederationServicer):
    """Answers as it is told to."""

    chunks: list[bytes] = field(default_factory=list)
    greeting: list[pb.ServerMessage] = field(default_factory=list)
    delivered: list[Any] = field(default_factory=list)
    status: grpc.StatusCode | None = None
    hangs: bool = False
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    async def _behave(self, context: Any) -> None:
        self.reached.set()
        if self.status is not None:
            await context.abort(self.status, "because\x1b[2J")
        if self.hangs:
            await asyncio.sleep(60)

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.ServerMessages]:
        self.delivered.append(await anext(request_iterator))
        await self._behave(context)
        for message in self.greeting:
            yield pb.ServerMessages(messages=[message])

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.Chunk]:
        self.delivered.append(request)
        for data in self.chunks:
            yield pb.Chunk(data=data)
        await self._behave(context)

    async def Deliver(self, request_iterator: Any, context: Any) -> pb.Receipt:
        await self._behave(context)
        self.delivered = [each async for each in request_iterator]
        return pb.Receipt(run_id="run")


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Play a scenario between a link and a coordinator, on loopback; TLS is tested elsewhere."""

    def insecure(server: str, credentials: object, *, options: Any) -> aio.Channel:
        return aio.insecure_channel(server, options)

    def played(coordinator: Coordinator, scenario: Callable[[Link], Awaitable[None]]) -> None:
        async def play() -> None:
            server = aio.server()
            services.add_FederationServicer_to_server(coordinator, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            monkeypatch.setattr(aio, "secure_channel", insecure)
            link = Link(f"127.0.0.1:{port}", ca_pem=b"", key_pem=b"", certificate_pem=b"")
            try:
                await scenario(link)
            finally:
                await link.close()
                await server.stop(None)

        asyncio.run(asyncio.wait_for(play(), 30))

    return played


def cut(data: bytes, size: int = CHUNK_BYTES) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [CHUNK_BYTES, 1000_003])
def test_a_large_blob_is_fetched_in_chunks_of_any_size(talk, size):
    coordinator = Coordinator(chunks=cut(VECTOR.tobytes(), size))

    async def scenario(link: Link) -> None:
        out = np.empty_like(VECTOR)
        await link.fetch("run", Download(BLOB, out))
        np.testing.assert_array_equal(out, VECTOR)
        (request,) = coordinator.delivered
        assert (request.run_id, request.digest, request.offset) == ("run", BLOB.digest, 0)

    talk(coordinator, scenario)


def test_a_small_blob_rides_inline_and_nothing_is_asked_for(talk):
    coordinator = Coordinator()

    async def scenario(link: Link) -> None:
        small, out = VECTOR[:10].copy(), np.empty(10, np.float32)
        await link.fetch("run", Download(encode_blob(bytes_of(small)), out))
        np.testing.assert_array_equal(out, small)
        assert coordinator.delivered == []

    talk(coordinator, scenario)


@pytest.mark.parametrize(
    "chunks",
    [
        [*cut(VECTOR.tobytes()), b"more"],
        cut(VECTOR.tobytes())[:-1],
        cut(VECTOR[::-1].tobytes()),
        [],
        [bytes(CHUNK_BYTES)] * 3,
    ],
    ids=["too many", "too few", "others", "none", "far too many"],
)
def test_bytes_that_are_not_what_was_announced_are_refused(talk, chunks):
    async def scenario(link: Link) -> None:
        with pytest.raises(RemoteProtocolError, match="bytes"):
            await link.fetch("run", Download(BLOB, np.empty_like(VECTOR)))

    talk(Coordinator(chunks=chunks), scenario)


def test_a_claim_of_another_size_is_refused_before_anything_is_asked_for(talk):
    coordinator = Coordinator()

    async def scenario(link: Link) -> None:
        with pytest.raises(RemoteProtocolError, match="found a claim of"):
            await link.fetch("run", Download(BLOB, np.empty(3, np.float32)))
        assert coordinator.delivered == []

    talk(coordinator, scenario)


def test_an_update_is_delivered_description_first_and_then_in_chunks(talk):
    coordinator = Coordinator()

    async def scenario(link: Link) -> None:
        update = pb.Update(run_id="run", vector=pb.Blob(digest=BLOB.digest, size=BLOB.size))
        assert (await link.deliver(update, bytes_of(VECTOR))).run_id == "run"
        first, *rest = coordinator.delivered
        assert first.update == update
        assert b"".join(each.data for each in rest) == VECTOR.tobytes()
        assert max(len(each.data) for each in rest) == CHUNK_BYTES

    talk(coordinator, scenario)


def test_a_session_begins_with_a_hello_and_a_welcome_of_the_same_protocol(talk):
    welcome = pb.ServerMessage(welcome=pb.Welcome(protocol=PROTOCOL, software="s", federation="f"))
    ended = pb.ServerMessage(ended=pb.Ended(run_id="run"))
    coordinator = Coordinator(greeting=[welcome, ended])

    async def scenario(link: Link) -> None:
        call, found = await link.open_session()
        assert coordinator.delivered[0].hello.protocol == PROTOCOL
        assert found == welcome.welcome
        assert [message async for message in link.read(call)] == [ended]

    talk(coordinator, scenario)


@pytest.mark.parametrize(
    "greeting",
    [
        [],
        [pb.ServerMessage(ended=pb.Ended())],
        [pb.ServerMessage(welcome=pb.Welcome(protocol=PROTOCOL + 1))],
    ],
    ids=["nothing", "something else", "another protocol"],
)
def test_any_other_greeting_is_refused(talk, greeting):
    async def scenario(link: Link) -> None:
        with pytest.raises((RemoteProtocolError, LinkError)):
            await link.open_session()

    talk(Coordinator(greeting=greeting), scenario)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, IdentityError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitError),
        (grpc.StatusCode.UNAVAILABLE, LinkError),
        (grpc.StatusCode.INTERNAL, LinkError),
    ],
)
def test_what_grpc_says_becomes_an_error_of_ours_in_printable_words(talk, status, kind):
    async def scenario(link: Link) -> None:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: link.fetch("run", Download(BLOB, np.empty_like(VECTOR))),
            lambda: link.deliver(pb.Update(), bytes_of(VECTOR)),
            lambda: link.open_session(),
        ]
        for call in calls:
            for _ in range(3):
                with pytest.raises(FedgeError) as error:
                    await call()
                if "Internal error from Core" not in str(error.value):  # gRPC's own, once in a while
                    break
            assert isinstance(error.value, kind)
            assert str(error.value).isprintable()

    talk(Coordinator(status=status), scenario)


def test_a_coordinator_that_is_not_there_is_a_broken_link(talk):
    async def scenario(link: Link) -> None:
        gone = Link("127.0.0.1:1", ca_pem=b"", key_pem=b"", certificate_pem=b"")
        with pytest.raises(LinkError, match=r"cannot reach the coordinator at 127\.0\.0\.1:1"):
            await gone.open_session()
        await gone.close()

    talk(Coordinator(), scenario)


def test_an_upload_whose_link_is_closed_under_it_is_a_broken_link_and_not_the_end_of_its_task(talk):
    """The session's end closes the link. What gRPC then raises in the agent's work would end the agent."""
    coordinator = Coordinator(hangs=True)

    async def scenario(link: Link) -> None:
        upload = asyncio.create_task(link.deliver(pb.Update(), bytes_of(VECTOR)))
        await coordinator.reached.wait()
        await link.close()
        with pytest.raises(LinkError, match="closed"):
            await upload
        with pytest.raises(LinkError, match="closed"):
            await link.deliver(pb.Update(), bytes_of(VECTOR))
        with pytest.raises(LinkError, match="closed"):
            await link.fetch("run", Download(BLOB, np.empty_like(VECTOR)))

    talk(coordinator, scenario)


def test_a_task_that_is_cancelled_itself_ends_as_cancelled(talk):
    coordinator = Coordinator(hangs=True)

    async def scenario(link: Link) -> None:
        upload = asyncio.create_task(link.deliver(pb.Update(), bytes_of(VECTOR)))
        await coordinator.reached.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload

    talk(coordinator, scenario)
