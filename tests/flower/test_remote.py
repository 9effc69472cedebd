"""The stream of a ServerApp's process: what goes over it once, what again, and until when."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from fedge.errors import LinkError, RemoteProtocolError, RunError
from fedge.records import AppError, AppMessage, ArrayRecord, RawArray
from fedge.wire import fedge_pb2 as pb
from fedge.wire import records
from fedge.wire.codec import encode_blob
from fedge.wire.records import Packed, pack
from fedge_server.flower import remote
from fedge_server.flower.remote import Remote
from fedge_server.flower.stream import bundled

OFFER = pb.AppOffer(app="team/app", version="1.0.0")


class Gone(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "connection refused"


class Stream:
    """One stream of a coordinator that does what a test says."""

    def __init__(self, requests: Iterator[pb.AppRequest | bytes]) -> None:
        self.heard: list[Any] = []
        self._events: queue.Queue[pb.AppEvent | bytes | Exception | None] = queue.Queue()
        threading.Thread(target=lambda: self.heard.extend(requests), daemon=True).start()

    def says(self, *events: pb.AppEvent | bytes | Exception | None) -> None:
        for each in events:
            self._events.put(each)

    def opens(self) -> None:
        self.says(pb.AppEvent(opened=pb.AppOpened(run_id="app-1")), pb.AppEvent(nodes=pb.AppNodes(ids=[11])))

    def __iter__(self) -> Iterator[pb.AppEvent | bytes | None]:
        while True:
            event = self._events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        self.says(Gone())

    def kinds(self) -> list[str | None]:
        return [each.WhichOneof("kind") for each in self.heard]


class Coordinator:
    """`opening` is done with each stream, by number."""

    def __init__(self, opening: Callable[[int, Stream], None]) -> None:
        self.streams: list[Stream] = []
        self._opening = opening

    def __call__(self, requests: Iterator[pb.AppRequest | bytes]) -> Stream:
        stream = Stream(requests)
        self.streams.append(stream)
        self._opening(len(self.streams), stream)
        return stream


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sent(id: str, node: int = 11) -> Packed:
    return Packed(AppMessage(id, "train", node, {}, ttl=1000.0), pack({}))


def reply_to(id: str) -> pb.AppEvent:
    blob = encode_blob(b"".join(bytes(part) for part in pack({})))
    return pb.AppEvent(reply=records.encode(AppMessage(f"{id}/reply", "train", 1, {}, reply_to=id), blob))


def begun(coordinator: Coordinator) -> tuple[Remote, list[str], list[str]]:
    said: list[str] = []
    heard: list[str] = []
    found = Remote(coordinator, OFFER, server="c:1", say=said.append)
    found.to(lambda packed: heard.append(packed.about.reply_to), lambda: None)
    return found, said, heard


def arrays(*values: memoryview) -> list[Packed]:
    contents = [pack({"arrays": ArrayRecord({"x": RawArray("int64", (2,), each)})}) for each in values]
    return [Packed(AppMessage(str(at), "train", at, {}), each) for at, each in enumerate(contents)]


def test_messages_of_one_content_share_it_and_those_of_others_do_not():
    whole = memoryview(np.arange(4)).cast("B")
    same, also, other = whole[:16], whole[:16], whole[16:]
    found = bundled(arrays(same, other, also))
    assert [[each.about.id for each in bundle.messages] for bundle in found] == [["0", "2"], ["1"]]
    contents = [bytes(bundle.blob.inline)[-16:] for bundle in found]
    assert contents == [bytes(same), bytes(other)]


def test_what_has_no_reply_is_sent_again_over_the_next_stream_and_nothing_else():
    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, said, heard = begun(coordinator)
    assert list(found.give([sent("1"), sent("2"), sent("3", node=99)])) == [True, True, False]
    coordinator.streams[0].says(reply_to("1"))
    until(lambda: heard == ["1"])
    coordinator.streams[0].says(Gone())
    until(lambda: len(coordinator.streams) == 2 and len(coordinator.streams[1].heard) >= 2)
    opening, again = coordinator.streams[1].heard[:2]
    assert (opening.open.run_id, list(opening.open.waiting)) == ("app-1", ["2"])
    assert [each.id for each in again.send.messages] == ["2"]
    assert [list(each.forget.ids) for each in coordinator.streams[0].heard if each.HasField("forget")] == [
        ["1"]
    ]
    assert "trying again" in said[0]
    assert "is back; 1 messages are sent again" in said[1]
    found.close()


def test_what_is_dropped_while_a_stream_is_opened_is_said_when_it_is():
    gate = threading.Event()

    def opening(number: int, stream: Stream) -> None:
        if number == 1:
            stream.opens()
        else:
            threading.Thread(target=lambda: (gate.wait(60), stream.opens()), daemon=True).start()

    coordinator = Coordinator(opening)
    found, _, _ = begun(coordinator)
    found.give([sent("1"), sent("2")])
    coordinator.streams[0].says(Gone())
    until(lambda: len(coordinator.streams) == 2)
    found.drop(["1"])
    gate.set()
    until(lambda: len(coordinator.streams[1].heard) >= 3)
    _, forget, again = coordinator.streams[1].heard[:3]
    assert (list(forget.forget.ids), [each.id for each in again.send.messages]) == (["1"], ["2"])
    found.close()


@pytest.mark.parametrize("opens", [False, True])
def test_a_coordinator_of_which_nothing_comes_is_given_up(opens: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 1.0)
    monkeypatch.setattr(remote, "_PAUSE_S", 0.05)

    def opening(number: int, stream: Stream) -> None:
        if number == 1 or opens:
            stream.opens()
        if number > 1:
            stream.says(Gone())

    coordinator = Coordinator(opening)
    found, _, _ = begun(coordinator)
    found.give([sent("1")])
    coordinator.streams[0].says(Gone())
    with pytest.raises(LinkError, match="nothing has come of it for 1 s"):
        found.wait_for(2, seconds=60.0)
    with pytest.raises(LinkError, match="nothing has come of it"):
        found.check()
    assert len(coordinator.streams) < 30
    found.close()


def test_a_coordinator_that_ends_the_app_is_not_asked_again():
    class Ended(Gone):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.FAILED_PRECONDITION

    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, _, _ = begun(coordinator)
    coordinator.streams[0].says(Ended())
    with pytest.raises(RunError, match="connection refused"):
        found.wait_for(2, seconds=60.0)
    assert len(coordinator.streams) == 1
    found.close()


def test_an_app_that_waits_for_nodes_in_vain_says_who_refuses():
    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, _, _ = begun(coordinator)
    coordinator.streams[0].says(pb.AppEvent(nodes=pb.AppNodes(ids=[11], refusals=["b: task_not_allowed"])))
    until(lambda: found.refusals)
    with pytest.raises(RunError, match=r"has had 2 nodes within 0\.1 s, found 1 nodes: b: task_not_allowed"):
        found.wait_for(2, seconds=0.1)
    found.close()


def test_a_reply_of_another_length_than_it_says_ends_the_app():
    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, _, heard = begun(coordinator)
    huge = reply_to("1")
    huge.reply.content.CopyFrom(pb.Blob(digest=bytes(32), size=3))
    coordinator.streams[0].says(huge, b"1234")
    with pytest.raises(RemoteProtocolError, match="expected 3 bytes of a reply, found others"):
        found.wait_for(2, seconds=60.0)
    assert heard == []
    found.close()


@pytest.mark.parametrize("event", [None, b"1234"], ids=["noise", "bytes of nothing"])
def test_an_event_that_is_none_ends_the_app(event: bytes | None):
    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, _, _ = begun(coordinator)
    coordinator.streams[0].says(event)
    with pytest.raises(RemoteProtocolError, match="expected news of the app"):
        found.wait_for(2, seconds=60.0)
    found.close()


def test_a_reply_for_which_there_is_no_room_is_an_error_for_that_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "_room", lambda size: None)
    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, _, _ = begun(coordinator)
    replies: list[Packed] = []
    found.to(replies.append, lambda: None)
    large = reply_to("1")
    large.reply.content.CopyFrom(pb.Blob(digest=bytes(32), size=8))
    data = b"1234"
    coordinator.streams[0].says(large, data, data, reply_to("2"))
    until(lambda: len(replies) == 2)
    assert isinstance(replies[0].about.content, AppError)
    assert "the reply has 8 bytes, for which this process has no room" in replies[0].about.content.reason
    assert replies[1].unpacked().content == {}
    found.close()


def test_a_process_that_ends_while_its_link_is_broken_says_so_when_the_link_is_back():
    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, _, _ = begun(coordinator)
    coordinator.streams[0].says(Gone())
    until(lambda: found._requests is None)
    found.close()
    until(lambda: len(coordinator.streams) == 2 and "close" in coordinator.streams[1].kinds())


def test_a_message_whose_close_is_said_ends_the_stream():
    coordinator = Coordinator(lambda number, stream: stream.opens())
    found, _, _ = begun(coordinator)
    found.close("its ServerApp failed: ValueError")
    until(lambda: "close" in coordinator.streams[0].kinds())
    assert coordinator.streams[0].heard[-1].close.failed == "its ServerApp failed: ValueError"
    assert len(coordinator.streams) == 1
