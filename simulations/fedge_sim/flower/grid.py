"""Flower's `Grid` for an app that is simulated: replies are there the moment that they exist, nobody polls."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from threading import Condition
from typing import Final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.errors import TaskError
from fedge.records import AppError, AppMessage
from fedge_flower.internals import ErrorCode, NodeInfo, Run, with_id
from fedge_flower.node import reply_to
from fedge_flower.records import message_of, plain_of
from fedge_sim.flower.nodes import Nodes, Packed, Setting

log = logging.getLogger(__name__)

MAX_WAIT_S: Final = 3600.0
"""What a thread can wait at once; then it looks again."""


class LocalGrid(Grid):
    """May be used by several threads. What `send_and_receive` returns is in the order of what was sent."""

    def __init__(self, setting: Setting, *, nodes: int, workers: int) -> None:
        self._run = Run.create_empty(setting.run_id)
        self._changed = Condition()
        self._replies: dict[str, AppMessage] = {}
        self._expected: dict[str, tuple[float, AppMessage]] = {}
        """Messages to which there is no reply yet, and when it is too late for one."""
        self._calls: dict[str, _Call] = {}
        self.sent = self.received = 0
        self._nodes = Nodes(setting, count=nodes, workers=workers, answered=self._hear)

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
        """All nodes, by partition."""
        return self._nodes.ids

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes, by partition."""
        return [NodeInfo(node_id=each) for each in self._nodes.ids]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give messages to their nodes; an empty id for one whose node there is not.

        Raises:
            ValueError, TypeError, LimitError: one is a reply, was sent before, or holds what none may; none was sent.
        """
        packed = []
        for message in messages:
            about = message.metadata
            if about.message_id or about.reply_to_message_id or about.ttl <= 0:
                raise ValueError(f"expected a new message with time to live, found {about}")
            packed.append(Packed.of(plain_of(with_id(message, message_id=uuid.uuid4().hex))))
        return [self._push(each) for each in packed]

    def _push(self, packed: Packed) -> str:
        message = packed.message
        with self._changed:
            self._expected[message.id] = time.monotonic() + message.ttl, message
            self.sent += 1
        if self._nodes.give(packed):
            return message.id
        log.error("flower_node_unknown node=%d", message.node)
        with self._changed:
            del self._expected[message.id]
            self.sent -= 1
        return ""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that there are to these messages, once; an error for each whose time to live is over."""
        ids = list(message_ids)
        self._expire(ids)
        with self._changed:
            found = [self._replies.pop(each) for each in ids if each in self._replies]
        return [message_of(each, run_id=self._run.run_id) for each in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As Flower says. What is not answered in time is called off: its node goes on with the next message, with the
        state that it had before.

        Raises:
            TaskError: the app's ClientApp cannot be loaded.
        """
        ids = [each for each in self.push_messages(messages) if each]
        if late := self._wait(ids, time.monotonic() + timeout if timeout is not None else math.inf):
            log.warning("flower_replies_late count=%d of=%d", len(late), len(ids))
            self._nodes.drop(late)
        if self._nodes.failure is not None:
            raise TaskError(str(self._nodes.failure))
        return self.pull_messages(ids)

    def close(self) -> None:
        """Nobody works any more."""
        self._nodes.close()

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
            self._hear(reply_to(message, AppError(ErrorCode.MESSAGE_UNAVAILABLE, reason)))
        if over:
            self._nodes.drop(over)

    def _hear(self, reply: AppMessage) -> None:
        with self._changed:
            if self._expected.pop(reply.reply_to, None) is None:
                return
            self._replies[reply.reply_to] = reply
            self.received += 1
            if (call := self._calls.pop(reply.reply_to, None)) is not None:
                call.left -= 1
                if not call.left:
                    self._changed.notify_all()


class _Call:
    """How many replies a `send_and_receive` waits for."""

    left = 0
