"""What one site may have of a coordinator, on the wire: the rest of it goes on working for the others."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from harness import PATIENCE_S, Federation, coordinator, run_toml, until
from scripted import Scripted, channel, scripted, status_of, update_of

from fedge.vector import bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.limits import MAX_SMALL_BYTES
from fedge.wire.status import RETRY_AFTER

QUIET = "[evaluation]\nevery = 0\n"


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator with room for two sessions, and for one upload of each site."""
    folder = tmp_path_factory.mktemp("tight")
    with coordinator(folder, max_sessions=2, max_site_uploads=1, max_site_downloads=1) as federation:
        yield federation


@pytest.fixture
def site(tight: Federation) -> Iterator[Scripted]:
    with scripted(tight.address, tight.enrol("greedy")) as connected:
        yield connected
    until(lambda: "greedy" not in tight.connected(), "the site is gone")


def retry_after(error: grpc.RpcError) -> float:
    """When the coordinator would like to be asked again."""
    assert error.code() == grpc.StatusCode.UNAVAILABLE, error.details()  # type: ignore[attr-defined]
    trailing = dict(error.trailing_metadata())  # type: ignore[attr-defined]
    return float(trailing[RETRY_AFTER])


def test_a_site_with_an_upload_under_way_is_told_to_come_back_with_another(
    tight: Federation, site: Scripted
) -> None:
    with tight.submitted(run_toml("uploads", task="wide:task", size=1, quorum=1, more=QUIET)) as run_id:
        site.join(run_id)
        order = site.order(run_id)
        vector = np.ones(order.model.size // 4, np.float32)
        update, data = update_of(order, vector, inline=False), bytes(bytes_of(vector))
        begun, go_on = threading.Event(), threading.Event()

        def slowly() -> Iterator[pb.DeliverRequest]:
            yield pb.DeliverRequest(update=update)
            yield pb.DeliverRequest(data=data[: len(data) // 8 * 4])
            begun.set()
            go_on.wait(PATIENCE_S)
            yield pb.DeliverRequest(data=data[len(data) // 8 * 4 :])

        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(site.stub.Deliver, slowly(), timeout=PATIENCE_S)
            begun.wait(PATIENCE_S)
            half = len(data) // 8 * 4
            request = pb.ResumeRequest(run_id=run_id, id=order.id, digest=b"x" * 32)

            def second() -> float | None:
                try:
                    site.deliver(update, data)
                except grpc.RpcError as error:
                    return retry_after(error)
                return None

            assert until(second, "the second one is told when to come back") > 0
            go_on.set()
            receipt = first.result()
        assert not receipt.HasField("refusal"), receipt
        assert site.stub.Resume(request).received == 0
        assert half


def test_a_site_that_finds_no_room_is_told_when_to_come_back(tight: Federation) -> None:
    with scripted(tight.address, tight.enrol("one")), scripted(tight.address, tight.enrol("two")):
        with channel(tight.address, tight.enrol("three")) as opened:
            stub = services.FederationStub(opened)
            hello = pb.ClientMessage(hello=pb.Hello(protocol=1))
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Session(iter([hello])))
        assert retry_after(caught.value) > 1
        assert tight.connected() == {"one", "two"}
    until(lambda: not tight.connected(), "both are gone")


@pytest.mark.parametrize("method", ["Fetch", "Resume", "Renew"])
def test_a_body_above_the_cap_is_not_even_parsed(tight: Federation, site: Scripted, method: str) -> None:
    with channel(tight.address, tight.enrol("greedy")) as opened:
        call = opened.unary_unary(f"/fedge.v1.Federation/{method}")
        status, _ = status_of(lambda: call(bytes(MAX_SMALL_BYTES + 1), timeout=PATIENCE_S))
        garbage, _ = status_of(lambda: call(b"\xff\xff garbage", timeout=PATIENCE_S))
    assert status == garbage == grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in tight.server.output


@pytest.mark.slow
def test_a_connection_that_says_nothing_is_closed(tight: Federation) -> None:
    host, _, port = tight.address.rpartition(":")
    silent = [socket.create_connection((host, int(port)), timeout=PATIENCE_S) for _ in range(50)]
    with scripted(tight.address, tight.enrol("talkative")):
        assert "talkative" in tight.connected(), "others are served meanwhile"
    for each in silent:
        each.settimeout(PATIENCE_S)
        while each.recv(4096):
            pass
        each.close()
