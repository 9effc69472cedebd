"""An app's nodes on a coordinator's sites: messages go over one stream, which is opened again when it breaks.

What has no reply yet is sent again over the next stream; coordinator and sites know messages by their ids. What the
ServerApp itself has in memory is in this process alone: if this process ends, the app has ended.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import grpc
import numpy as np

from fedge.errors import BusyError, FedgeError, LimitError, LinkError, RemoteProtocolError, RunError
from fedge.records import AppError, ErrorCode
from fedge.vector import digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.chunks import Piece, encoded, open_app_event
from fedge.wire.codec import printable
from fedge.wire.limits import Limits
from fedge.wire.records import Packed, decode
from fedge.wire.status import error_of
from fedge_server.flower.stream import Requests, bundled

log = logging.getLogger(__name__)

PATIENCE_S: Final = 600.0
"""How long a coordinator may be away."""

OPENED_S: Final = 60.0
CLOSED_S: Final = 10.0
_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 10.0
_LASTS_S: Final = 30.0
_LOOK_S: Final = 1.0


Events = Iterator[pb.AppEvent | Piece | None]
"""Of a stream; None is none that can be read."""

Call = Callable[[Iterator[pb.AppRequest | bytes]], Any]
"""Opens a stream: what it returns is iterated over for Events, and can be cancelled."""


def app_call(channel: grpc.Channel) -> Call:
    """The coordinator's `Admin.App`, whose contents pass as bytes."""
    name = pb.DESCRIPTOR.services_by_name["Admin"].full_name
    found: Call = channel.stream_stream(
        f"/{name}/App", request_serializer=encoded, response_deserializer=open_app_event
    )
    return found


class Remote:
    """The carrier of a Grid. `say` is told, in words, when the coordinator goes and comes back.

    Raises:
        FedgeError: the coordinator does not let the app in, or cannot be reached.
    """

    def __init__(self, call: Call, offer: pb.AppOffer, *, server: str, say: Callable[[str], None]) -> None:
        self.run_id = ""
        self.refusals: Sequence[str] = ()
        self._call, self._offer, self._server, self._say = call, offer, server, say
        self._answered: Callable[[Packed], None] = lambda reply: None
        self._wake: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._requests: Requests | None = None
        self._cancel: Callable[[], object] = lambda: None
        self._unanswered: dict[str, Packed] = {}
        self._waited_for: set[str] = set()
        """What the coordinator was told at the beginning of the stream that it has to answer."""
        self._progress = False
        self._nodes: list[int] = []
        self._known: set[int] = set()
        self._failure: FedgeError | None = None
        self._closing = self._has_heard = False
        self._thread = threading.Thread(target=self._serve, name="fedge-flower-stream", daemon=True)
        self._thread.start()
        self._wait(lambda: self._has_heard, OPENED_S, "opened the app")

    def to(self, answered: Callable[[Packed], None], wake: Callable[[], None]) -> None:
        """Who hears of replies, and that `check` has something to say."""
        self._answered, self._wake = answered, wake

    def wait_for(self, nodes: int, *, seconds: float) -> None:
        """Until there are so many nodes.

        Raises:
            RunError: there are not by then.
            FedgeError: it is of no use to wait.
        """
        self._wait(lambda: len(self._nodes) >= nodes, seconds, f"had {nodes} nodes")

    def node_ids(self) -> list[int]:
        """Those there are now."""
        with self._changed:
            return list(self._nodes)

    def give(self, messages: Sequence[Packed]) -> Sequence[bool]:
        with self._changed:
            goes = [each.about.node in self._known for each in messages]
            sent = [each for each, good in zip(messages, goes, strict=True) if good]
            self._unanswered.update({each.about.id: each for each in sent})
            requests = self._requests
        if requests is not None:
            for bundle in bundled(sent):
                requests.put(bundle)
        return goes

    def drop(self, ids: Collection[str]) -> None:
        with self._changed:
            for each in ids:
                self._unanswered.pop(each, None)
        self._forget(ids)

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self, failed: str = "") -> None:
        """The ServerApp is done, or has failed; the coordinator and the sites are told."""
        with self._changed:
            if (
                not failed
            ):  # a link that is broken just now may be back in a moment; who interrupts is not to wait
                self._changed.wait_for(
                    lambda: self._requests is not None or self._failure is not None, CLOSED_S
                )
            self._closing = True
            if self._requests is not None:
                self._requests.put(pb.AppRequest(close=pb.AppClose(failed=failed)))
                self._requests.end()
            self._changed.notify_all()
        self._thread.join(CLOSED_S)
        self._cancel()

    def _forget(self, ids: Collection[str]) -> None:
        with self._changed:
            if self._requests is not None:
                self._requests.put(pb.AppRequest(forget=pb.AppIds(run_id=self.run_id, ids=ids)))

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        with self._changed:
            while not condition():
                if self._failure is not None:
                    raise self._failure
                left = until - time.monotonic()
                if left <= 0:
                    refused = "; ".join(self.refusals)
                    raise RunError(
                        f"expected that the coordinator at {self._server} has {what} within {seconds:g} s, found "
                        f"{len(self._nodes)} nodes{': ' if refused else ''}{refused}"
                    )
                self._changed.wait(min(left, _LOOK_S))

    # The thread of the stream.

    def _serve(self) -> None:
        """One stream after the other, until the app is closed or cannot go on."""
        away_since, failures = time.monotonic(), 0
        while not self._closing:
            began = time.monotonic()
            error = self._converse()
            if error is None or self._closing:
                return
            with self._changed:
                was_there, self._requests = self._requests is not None, None
            if not isinstance(error, LinkError) or not self.run_id:
                self._fail(error)
                return
            now = time.monotonic()
            # One that opens streams and ends them again is not there, either.
            if self._progress or now - began > _LASTS_S:
                away_since, failures = now, 0
            if now - away_since > PATIENCE_S:
                self._fail(LinkError(f"{error}; nothing has come of it for {PATIENCE_S:g} s"))
                return
            if was_there:
                self._say(f"{error}; trying again for {PATIENCE_S:g} s, the app waits meanwhile")
            wait_s = min(_MAX_PAUSE_S, _PAUSE_S * 2**failures) if was_there else _PAUSE_S
            failures += was_there
            if isinstance(error, BusyError):
                wait_s = max(wait_s, error.retry_after_s)
            time.sleep(wait_s * random.uniform(1, 1.2))  # noqa: S311  # jitter, not a secret

    def _converse(self) -> FedgeError | None:
        """One stream from its beginning to its end; why it ended, None if it was to."""
        with self._changed:
            waiting = list(self._unanswered)
            self._waited_for, self._progress = set(waiting), False
            opening = pb.AppOpen(run_id=self.run_id, offer=self._offer, waiting=waiting)
            requests = Requests(pb.AppRequest(open=opening))
        call = self._call(iter(requests))
        self._cancel = call.cancel
        events: Events = iter(call)
        try:
            for event in events:
                if not isinstance(event, pb.AppEvent):
                    raise RemoteProtocolError("expected news of the app, found bytes")
                if event.HasField("opened"):
                    self._opened(event.opened.run_id, requests)
                elif event.HasField("nodes"):
                    self._has_nodes(event.nodes)
                elif event.HasField("reply"):
                    self._reply(event.reply, events)
            return None if self._closing else LinkError(f"the coordinator at {self._server} ended the stream")
        except grpc.RpcError as error:
            status = cast("grpc.Call", error)  # every error of a call is one
            return error_of(status.code().name, status.details() or "", peer=self._server)
        except FedgeError as error:
            return error
        except Exception as error:  # a defect: whoever waits is to hear of it
            log.exception("flower_stream_crashed")
            return RunError(f"internal error: {type(error).__name__}: {error}")
        finally:
            requests.end()
            call.cancel()

    def _opened(self, run_id: str, requests: Requests) -> None:
        """The coordinator knows the app; what it has not answered is sent again."""
        with self._changed:
            again = list(self._unanswered.values())
            dropped = self._waited_for - self._unanswered.keys()
            if dropped:  # while the stream was being opened
                requests.put(pb.AppRequest(forget=pb.AppIds(run_id=run_id, ids=dropped)))
            if self.run_id:
                self._say(f"the coordinator at {self._server} is back; {len(again)} messages are sent again")
            self.run_id = run_id
            self._requests = requests
            for bundle in bundled(again):
                requests.put(bundle)
            self._changed.notify_all()

    def _has_nodes(self, nodes: pb.AppNodes) -> None:
        with self._changed:
            self._nodes, self._has_heard = list(nodes.ids), True
            self._known.update(nodes.ids)
            self.refusals = [printable(each) for each in nodes.refusals]
            self._changed.notify_all()

    def _reply(self, message: pb.AppMessage, events: Events) -> None:
        reply = Packed(decode(message))
        if message.WhichOneof("body") == "content":
            content = self._content(message.content, events)
            if content is None:
                why = f"the reply has {message.content.size} bytes, for which this process has no room"
                reply = Packed(replace(reply.about, content=AppError(ErrorCode.UNKNOWN, why)))
            else:
                reply = Packed(reply.about, (content,))
        id = reply.about.reply_to
        with self._changed:
            self._unanswered.pop(id, None)
            self._progress = True
        self._answered(reply)
        self._forget([id])  # nobody else needs to keep it: it is of use to this process alone

    def _content(self, blob: pb.Blob, events: Events) -> memoryview | None:
        """The bytes of a reply; None if there is no room for them."""
        if blob.HasField("inline"):
            whole = memoryview(blob.inline)
        else:
            room, at = _room(blob.size), 0
            while at < blob.size:
                data = next(events, None)
                if not isinstance(data, bytes | memoryview) or not data or at + len(data) > blob.size:
                    raise RemoteProtocolError(f"expected {blob.size} bytes of a reply, found others")
                if room is not None:
                    room[at : at + len(data)] = data
                at += len(data)
            if room is None:
                return None
            whole = room
        if len(whole) != blob.size or digest_of(whole) != blob.digest:
            raise RemoteProtocolError("expected a reply of the announced size and digest, found another")
        return whole

    def _fail(self, error: FedgeError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        self._wake()


def _room(size: int) -> memoryview | None:
    """Memory of so many bytes, if there may be and is so much."""
    try:
        return np.empty(Limits().check_model(size), np.uint8).data
    except (LimitError, MemoryError):
        return None
