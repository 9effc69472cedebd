"""A site that is played message by message: our stubs and a real certificate, and no agent behind them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc
import numpy as np
import tiny

from fedge.run import RunConfig
from fedge.seeds import work_seed
from fedge.task import Site
from fedge.vector import Array, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.codec import decode_order_id, encode_metrics
from fedge.wire.limits import PROTOCOL
from fedge_client.identity import Identity
from fedge_client.torch.trainer import Trainer

WAIT_S = 30.0
HELLO = pb.ClientMessage(hello=pb.Hello(protocol=PROTOCOL, software="scripted"))
_UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@contextmanager
def channel(server: str, identity: Identity) -> Iterator[grpc.Channel]:
    """A connection under an identity, without the caps that our own client puts on itself."""
    credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)
    with grpc.secure_channel(server, credentials, options=_UNLIMITED) as opened:
        yield opened


class Stream:
    """One session: what is put in is sent, what arrives is kept until it is asked for."""

    def __init__(self, stub: services.FederationStub, *, first: pb.ClientMessage | None = HELLO) -> None:
        self._outgoing: queue.Queue[pb.ClientMessage | None] = queue.Queue()
        self._incoming: queue.Queue[pb.ServerMessage | None] = queue.Queue()
        if first is not None:
            self.send(first)
        self._call = stub.Session(iter(self._outgoing.get, None))
        self._kept: list[pb.ServerMessage] = []
        self.status: grpc.StatusCode | None = None
        self.details = ""
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: pb.ClientMessage) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        """Half-close: nothing more will be sent."""
        self._outgoing.put(None)

    def cancel(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()

    def next(self, kind: str, *, run_id: str | None = None) -> Any:
        """The body of the next message of this kind (of this run); others are kept for later."""
        for message in self._messages():
            if message.WhichOneof("kind") == kind:
                body = getattr(message, kind)
                if run_id is None or body.run_id == run_id:
                    self._kept.remove(message)
                    return body
        raise AssertionError(f"the stream ended before any {kind}: {self.status} {self.details}")

    def _messages(self) -> Iterator[pb.ServerMessage]:
        """What was kept, then what arrives, which is kept, until the stream ends."""
        yield from list(self._kept)
        while (message := self._incoming.get(timeout=WAIT_S)) is not None:
            self._kept.append(message)
            yield message

    def end(self) -> tuple[grpc.StatusCode | None, str]:
        """Wait until the coordinator ends the stream; with which status and words."""
        for _ in self._messages():
            pass
        return self.status, self.details

    def _read(self) -> None:
        try:
            for batch in self._call:
                for message in batch.messages:
                    self._incoming.put(message)
            self.status = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.status, self.details = error.code(), error.details()  # type: ignore[attr-defined]
        self._incoming.put(None)


class Scripted:
    """A connected site under our control, and the honest work that it would do."""

    def __init__(self, opened: grpc.Channel, identity: Identity) -> None:
        self.name = identity.site
        self.stub = services.FederationStub(opened)
        self.stream = Stream(self.stub)
        self.stream.next("welcome")

    def join(self, run_id: str) -> pb.Offer:
        """Accept a run that is offered."""
        offer: pb.Offer = self.stream.next("offer", run_id=run_id)
        self.stream.send(pb.ClientMessage(accept=pb.Accept(run_id=run_id)))
        return offer

    def order(self, run_id: str) -> pb.Order:
        order: pb.Order = self.stream.next("order", run_id=run_id)
        return order

    def hand_in(self, update: pb.Update) -> pb.Receipt:
        """Send an update in the session; its receipt."""
        self.stream.send(pb.ClientMessage(update=update))
        receipt: pb.Receipt = self.stream.next("receipt", run_id=update.run_id)
        return receipt

    def deliver(self, update: pb.Update, *chunks: bytes) -> pb.Receipt:
        """Send an update in chunks; its receipt."""

        def requests() -> Iterator[pb.DeliverRequest]:
            yield pb.DeliverRequest(update=update)
            for chunk in chunks:
                yield pb.DeliverRequest(data=chunk)

        receipt: pb.Receipt = self.stub.Deliver(requests(), timeout=WAIT_S)
        return receipt

    def fetch(self, run_id: str, digest: bytes, *, offset: int = 0) -> bytes:
        request = pb.FetchRequest(run_id=run_id, digest=digest, offset=offset)
        return b"".join(chunk.data for chunk in self.stub.Fetch(request, timeout=WAIT_S))


@contextmanager
def scripted(server: str, identity: Identity) -> Iterator[Scripted]:
    """A site that has greeted the coordinator; its connection ends with the block."""
    with channel(server, identity) as opened:
        site = Scripted(opened, identity)
        try:
            yield site
        finally:
            site.stream.cancel()


def update_of(
    order: pb.Order, values: Array, *, num_examples: int = 1, inline: bool = True, **fields: Any
) -> pb.Update:
    """A well-formed update of an order; `fields` take the place of the message's own."""
    data = values.tobytes()
    blob = pb.Blob(digest=digest_of(data), size=len(data), inline=data if inline else None)
    well_formed = {"run_id": order.run_id, "id": order.id, "num_examples": num_examples, "vector": blob}
    return pb.Update(**(well_formed | fields))


def honest_update(order: pb.Order, run: RunConfig, *, site: str) -> pb.Update:
    """What an honest site of this name would hand in for an order of the tiny task."""
    trainer = Trainer(tiny.task, seed=run.seed)
    train, test = tiny.data(Site(site))
    model = np.frombuffer(order.model.inline, np.float32).copy()
    out = np.empty_like(model)
    id = decode_order_id(order.id)
    seed = work_seed(run.seed, site=site, kind=id.kind, round=id.round)
    if id.kind == "evaluate":
        done, vector = trainer.evaluate(model, test), out[:0]
    else:
        done, vector = trainer.train(model, train, run.work, seed=seed, out=out), out
    update = update_of(order, vector, num_examples=done.num_examples)
    update.metrics.extend(encode_metrics(done.metrics))
    return update


def status_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The status and words with which a call is refused."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()  # type: ignore[attr-defined,no-any-return]
    raise AssertionError("expected the call to be refused; it was answered")


Connected = AbstractContextManager[Scripted]
