"""Flower's `Grid` over whatever carries messages: replies are there the moment that they exist, nobody polls."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from threading import Condition
from typing import Final, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.errors import RemoteProtocolError
from fedge.records import AppError, AppMessage, ErrorCode, reply_to
from fedge.wire.records import Packed
from fedge_flower.internals import NodeInfo, Run, with_id
from fedge_flower.records import message_of, plain_of

log = logging.getLogger(__name__)

MAX_WAIT_S: Final = 3600.0
"""What a thread can wait at once; then it looks again."""


class Carrier(Protocol):
    """Takes messages to nodes, and hands in their replies by `AppGrid.hear`. Its methods are called on any thread."""

    def node_ids(self) -> list[int]:
        """Those there are now."""
        ...

    def give(self, messages: Sequence[Packed]) -> Sequence[bool]:
        """Take these to their nodes; False for one that there is not.

        Raises:
            FedgeError: no more can be carried.
        """
        ...

    def drop(self, ids: Collection[str]) -> None:
        """Nobody waits for what comes of these messages."""
        ...

    def check(self) -> None:
        """
        Raises:
            FedgeError: it is of no use to go on.
        """
        ...


class AppGrid(Grid):
    """May be used by several threads. What `send_and_receive` returns is in the order of what was sent.

    Every method raises what its carrier's `check` does, once that has something to say.
    """

    def __init__(self, run_id: int) -> None:
        self._run = Run.create_empty(run_id)
        self._changed = Condition()
        self._replies: dict[str, Packed] = {}
        self._expected: dict[str, tuple[float, AppMessage]] = {}
        """Messages to which there is no reply yet, and when it is too late for one."""
        self._calls: dict[str, _Call] = {}
        self.sent = self.received = 0
        self._carrier: Carrier

    def over(self, carrier: Carrier) -> AppGrid:
        """Messages go this way; to be said first, and once."""
        self._carrier = carrier
        return self

    def set_run(self, run: Run) -> None:
        """It has one."""
        self._run = run

    @property
    def run(self) -> Run:
        """Of the app."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As `flwr.app.Message` makes it, which has taken this one's place in Flower."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes that there are now."""
        self._carrier.check()
        return self._carrier.node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes that there are now."""
        return [NodeInfo(node_id=each) for each in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give messages to their nodes; an empty id for one whose node there is not.

        Raises:
            ValueError, TypeError, LimitError: one is a reply, was sent before, or holds what none may; none was sent.
        """
        packed = []
        self._carrier.check()
        for message in messages:
            its = message.metadata
            if its.message_id or its.reply_to_message_id or its.ttl <= 0:
                raise ValueError(f"expected a new message with time to live, found {its}")
            packed.append(Packed.of(plain_of(with_id(message, message_id=uuid.uuid4().hex))))
        now = time.monotonic()
        with self._changed:
            self._expected.update({each.about.id: (now + each.about.ttl, each.about) for each in packed})
            self.sent += len(packed)
        went = self._carrier.give(packed)
        lost = [each.about for each, gone in zip(packed, went, strict=True) if not gone]
        with self._changed:
            for about in lost:
                log.error("flower_node_unknown node=%d", about.node)
                self._expected.pop(about.id, None)
                self.sent -= 1
        return [each.about.id if gone else "" for each, gone in zip(packed, went, strict=True)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that there are to these messages, once; an error for each whose time to live is over."""
        ids = list(message_ids)
        self._expire(ids)
        with self._changed:
            found = [self._replies.pop(each) for each in ids if each in self._replies]
        if not found:
            self._carrier.check()
        return [message_of(_unpacked(each), run_id=self._run.run_id) for each in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As Flower says. What is not answered in time is called off: its node goes on with the next message, with the
        state that it had before."""
        ids = [each for each in self.push_messages(messages) if each]
        if late := self._wait(ids, time.monotonic() + timeout if timeout is not None else math.inf):
            log.warning("flower_replies_late count=%d of=%d", len(late), len(ids))
            self._carrier.drop(late)
        self._carrier.check()
        return self.pull_messages(ids)

    def hear(self, reply: Packed) -> None:
        """A reply has come; one that nobody waits for is dropped."""
        about = reply.about
        with self._changed:
            expected = self._expected.pop(about.reply_to, None)
            if expected is None:
                return
            asked = expected[1]
            # Whatever a node says of itself, this is what it was asked, and who it is.
            answer = reply_to(asked, about.content, now=about.created_at)
            self._replies[asked.id] = Packed(answer, reply.payload)
            self.received += 1
            if (call := self._calls.pop(asked.id, None)) is not None:
                call.left -= 1
                if not call.left:
                    self._changed.notify_all()

    def expected(self) -> list[str]:
        """The messages to which there is no reply yet."""
        with self._changed:
            return list(self._expected)

    def wake(self) -> None:
        """The carrier has something to say by `check`: whoever waits is to ask."""
        with self._changed:
            self._changed.notify_all()

    def _wait(self, ids: Sequence[str], until: float) -> set[str]:
        """Until there is a reply to all of these, or time is up: then those to which there is none, nor will be."""
        call = _Call()
        with self._changed:
            missing = [each for each in ids if each in self._expected]
            call.left = len(missing)
            self._calls.update(dict.fromkeys(missing, call))
        while True:
            with self._changed:
                ends = min(
                    (self._expected[each][0] for each in missing if each in self._expected), default=math.inf
                )
                while call.left and (left := min(ends, until) - time.monotonic()) > 0:
                    self._changed.wait(min(left, MAX_WAIT_S))
                    if call.left:
                        self._carrier.check()
                if not call.left:
                    return set()
                if time.monotonic() >= until:
                    late = {each for each in missing if self._expected.pop(each, None) is not None}
                    for each in late:
                        self._calls.pop(each, None)
                    return late
            self._expire(missing)

    def _expire(self, ids: Sequence[str]) -> None:
        """Messages whose time to live is over have an error for a reply, and are called off."""
        now = time.monotonic()
        with self._changed:
            over = [each for each in ids if each in self._expected and self._expected[each][0] <= now]
            messages = [self._expected[each][1] for each in over]
        for message in messages:
            reason = f"there was no reply within the {message.ttl:g} s that the message had"
            self.hear(_error(message, ErrorCode.MESSAGE_UNAVAILABLE, reason))
        if over:
            self._carrier.drop(over)


class _Call:
    """How many replies a `send_and_receive` waits for."""

    left = 0


def _unpacked(reply: Packed) -> AppMessage:
    """The reply; an error in its place if its bytes are none."""
    try:
        return reply.unpacked()
    except RemoteProtocolError as error:
        log.warning("flower_reply_refused node=%d reason=%s", reply.about.src, error)
        return replace(reply.about, content=AppError(ErrorCode.UNKNOWN, f"what came is no reply: {error}"))


def _error(message: AppMessage, code: ErrorCode, reason: str) -> Packed:
    return Packed(reply_to(message, AppError(code, reason), now=time.time()))
