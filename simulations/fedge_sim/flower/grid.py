"""Flower's `Grid` for an app that is simulated: replies are there the moment that they exist, nobody polls."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from threading import Condition

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.errors import TaskError
from fedge.records import AppMessage
from fedge_flower.internals import NodeInfo, Run, with_id
from fedge_flower.records import message_of, plain_of
from fedge_sim.flower.nodes import Nodes, Setting

log = logging.getLogger(__name__)


class LocalGrid(Grid):
    """May be used by several threads. What `send_and_receive` returns is in the order of what was sent."""

    def __init__(self, setting: Setting, *, nodes: int, workers: int) -> None:
        self._run = Run.create_empty(setting.run_id)
        self._changed = Condition()
        self._replies: dict[str, AppMessage] = {}
        self._expected: dict[str, float] = {}
        """When each message of which there is no reply yet is no longer worth one."""
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
            ValueError: a message is a reply, or was sent before.
            TypeError: it holds what none may.
        """
        ids = []
        for message in messages:
            about = message.metadata
            if about.message_id or about.reply_to_message_id or about.ttl <= 0:
                raise ValueError(f"expected a new message with time to live, found {about}")
            plain = plain_of(with_id(message, message_id=uuid.uuid4().hex))
            with self._changed:
                self._expected[plain.id] = time.monotonic() + plain.ttl
            if self._nodes.give(plain):
                self.sent += 1
                ids.append(plain.id)
            else:
                log.error("flower_node_unknown node=%d", plain.node)
                with self._changed:
                    del self._expected[plain.id]
                ids.append("")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that there are to these messages, once."""
        with self._changed:
            found = [self._replies.pop(each) for each in message_ids if each in self._replies]
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
        late = self._wait(ids, time.monotonic() + timeout if timeout is not None else None)
        if late:
            log.warning("flower_replies_late count=%d of=%d", len(late), len(ids))
            self._nodes.drop(late)
            with self._changed:
                for each in late:
                    self._expected.pop(each, None)
        if self._nodes.failure is not None:
            raise TaskError(str(self._nodes.failure))
        return self.pull_messages(ids)

    def close(self) -> None:
        """Nobody works any more."""
        self._nodes.close()

    def _wait(self, ids: Sequence[str], until: float | None) -> set[str]:
        """Until there is a reply to all of these, or time is up; those to which there is none."""
        late: set[str] = set()
        with self._changed:
            while missing := {each: self._expected[each] for each in ids if each in self._expected}:
                now = time.monotonic()
                if until is not None and now >= until:
                    return late.union(missing)
                if expired := [each for each, ends in missing.items() if ends <= now]:
                    late.update(expired)
                    for each in expired:
                        del self._expected[each]
                    continue
                ends = [*missing.values(), *([until] if until is not None else [])]
                self._changed.wait(min(ends) - now)
        return late

    def _hear(self, reply: AppMessage) -> None:
        with self._changed:
            if self._expected.pop(reply.reply_to, None) is not None:
                self._replies[reply.reply_to] = reply
                self.received += 1
                self._changed.notify_all()
