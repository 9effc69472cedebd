"""A site that breaks the protocol of a session is told so by a status, and the coordinator serves the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from harness import Federation, fedge, run_toml, until
from scripted import HELLO, Scripted, Stream, channel, scripted, status_of, update_of

from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.limits import MAX_MESSAGE_BYTES, PROTOCOL
from fedge_client.identity import Identity

TRAIN_1 = pb.OrderId(kind=pb.KIND_TRAIN, round=1, attempt=1)
FIRST = {
    "nothing": None,
    "another protocol": pb.ClientMessage(hello=pb.Hello(protocol=PROTOCOL + 1)),
    "no protocol": pb.ClientMessage(hello=pb.Hello()),
    "no hello": pb.ClientMessage(accept=pb.Accept(run_id="any")),
    "an empty message": pb.ClientMessage(),
}
LATER = {
    "a second hello": HELLO,
    "an empty message": pb.ClientMessage(),
    "an update for an order of no kind": pb.ClientMessage(
        update=pb.Update(run_id="any", id=pb.OrderId(round=1, attempt=1))
    ),
    "an update for an order of an unknown kind": pb.ClientMessage(
        update=pb.Update(run_id="any", id=pb.OrderId(kind=99, round=1, attempt=1))  # type: ignore[arg-type]
    ),
    "an update for attempt 0": pb.ClientMessage(
        update=pb.Update(run_id="any", id=pb.OrderId(kind=pb.KIND_TRAIN, round=1))
    ),
    "a refusal of an unknown code": pb.ClientMessage(
        refuse=pb.Refuse(run_id="any", refusal=pb.Refusal(code=999))
    ),
    "a failure for an unknown reason": pb.ClientMessage(
        failed=pb.Failed(run_id="any", id=TRAIN_1, refusal=pb.Refusal(code=0))
    ),
}


@pytest.fixture(scope="module")
def identity(bare: Federation) -> Identity:
    return bare.enrol("rude")


@pytest.fixture
def stub(bare: Federation, identity: Identity) -> Iterator[services.FederationStub]:
    with channel(bare.address, identity) as opened:
        yield services.FederationStub(opened)


@pytest.fixture
def site(bare: Federation, identity: Identity) -> Iterator[Scripted]:
    with scripted(bare.address, identity) as connected:
        yield connected


@pytest.fixture(autouse=True)
def the_next_is_served(bare: Federation, identity: Identity) -> Iterator[None]:
    yield
    with scripted(bare.address, identity):
        until(lambda: "rude" in bare.connected(), "the site can connect again")


@pytest.mark.parametrize("first", FIRST)
def test_a_session_begins_with_a_hello_of_this_protocol(stub: services.FederationStub, first: str) -> None:
    stream = Stream(stub, first=FIRST[first])
    stream.close()
    status, details = stream.end()
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert "expected a hello" in details


@pytest.mark.parametrize("kind", LATER)
def test_a_message_that_makes_no_sense_ends_the_session_and_says_why(site: Scripted, kind: str) -> None:
    site.stream.send(LATER[kind])
    status, details = site.stream.end()
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert "expected" in details


def test_a_message_above_the_cap_ends_the_session(site: Scripted) -> None:
    blob = pb.Blob(digest=bytes(32), size=1, inline=bytes(MAX_MESSAGE_BYTES + 1))
    site.stream.send(pb.ClientMessage(update=pb.Update(run_id="any", id=TRAIN_1, vector=blob)))
    assert site.stream.end()[0] == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_bytes_that_are_no_message_end_the_session(bare: Federation, identity: Identity) -> None:
    with channel(bare.address, identity) as opened:
        call = opened.stream_stream("/fedge.v1.Federation/Session")
        status, _ = status_of(lambda: list(call(iter([b"\xff\xff\xff garbage"]))))
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in bare.server.output


def test_a_site_that_connects_again_takes_the_place_of_its_earlier_session(
    bare: Federation, site: Scripted, stub: services.FederationStub
) -> None:
    second = Stream(stub)
    second.next("welcome")
    assert site.stream.end()[0] == grpc.StatusCode.OK
    assert bare.connected() == {"rude"}
    second.cancel()


def test_what_a_site_calls_a_run_cannot_forge_a_line_of_the_coordinators_log(
    bare: Federation, site: Scripted
) -> None:
    forged = "any\n2026-01-01 00:00:00,000 ERROR forged_event"
    receipt = site.hand_in(pb.Update(run_id=forged, id=TRAIN_1, num_examples=1))
    assert receipt.HasField("refusal")
    assert "forged_event" in bare.server.output
    assert not [line for line in bare.server.output.splitlines() if line.startswith("2026-01-01")]


def test_metrics_named_like_markup_do_not_break_the_owners_view(bare: Federation, site: Scripted) -> None:
    """Names of metrics are a site's to choose; the tables of `run show` and `watch` must bear them."""
    run_id = bare.submit(run_toml("markup", rounds=1, quorum=1, size=1, more="[evaluation]\nevery = 0"))
    site.join(run_id)
    update = update_of(site.order(run_id), np.zeros(4, np.float32))
    update.metrics.add(name="[/red]", value=1.0)
    update.metrics.add(name="f1[top5]", value=1.0)
    assert not site.hand_in(update).HasField("refusal")
    for command in ("show", "watch"):
        done = fedge("run", command, run_id, "--admin", bare.admin_toml)
        assert done.returncode == 0, done.stderr
        assert "[/red]" in done.stdout + done.stderr
        assert "f1[top5]" in done.stdout + done.stderr


def test_many_sessions_at_once_leave_one(bare: Federation, stub: services.FederationStub) -> None:
    streams: list[Stream] = []
    threads = [threading.Thread(target=lambda: streams.append(Stream(stub))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: sum(stream.status is None for stream in streams) == 1, "all but the last have ended")
    assert bare.connected() == {"rude"}
    for stream in streams:
        stream.cancel()
