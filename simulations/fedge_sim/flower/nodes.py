"""The nodes of a simulated Flower app: who they are, what each waits for, and the processes that run their ClientApps.

A node deals with one message at a time, in order; its state is kept here between them, so that any process can do the
next, and one that dies takes nothing with it but what it was at.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedge.errors import TaskError
from fedge.records import AppError, AppMessage, Content
from fedge.seeds import derive_seed
from fedge_flower.app import Settings
from fedge_flower.internals import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, ErrorCode
from fedge_flower.node import reply_to
from fedge_sim.flower.frames import Frames
from fedge_sim.python import python

log = logging.getLogger(__name__)

_ENDED_S: Final = 10.0

Answered = Callable[[AppMessage], None]
"""Hears of each reply; on any thread."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a process is told first."""

    folder: Path
    run_id: int
    config: Settings
    seed: int

    def as_json(self) -> bytes:
        told: dict[str, Any] = {
            "folder": str(self.folder.resolve()),
            "run_id": self.run_id,
            "config": dict(self.config),
            "seed": self.seed,
        }
        return json.dumps(told).encode()


@dataclass(slots=True, eq=False)
class _Node:
    config: Settings
    state: Content = field(default_factory=dict)
    waiting: deque[AppMessage] = field(default_factory=deque)
    done: int = 0


class Nodes:
    """`count` nodes, and `workers` processes that are started when there is work for them.

    `answered` is called with each reply. A process that cannot even load the app makes `failure` what it says.
    """

    def __init__(self, setting: Setting, *, count: int, workers: int, answered: Answered) -> None:
        self._setting, self._answered = setting, answered
        self._nodes = {
            derive_seed(setting.seed, "node", at): _Node({PARTITION_ID_KEY: at, NUM_PARTITIONS_KEY: count})
            for at in range(count)
        }
        self._ready: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._at_work: dict[str, _Process | None] = {}
        """The messages that were begun, and the process that is at each, once there is one."""
        self.failure: TaskError | None = None
        self._threads = [
            threading.Thread(target=self._serve, name=f"fedge-flower-{at}", daemon=True)
            for at in range(min(workers, count))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ids(self) -> list[int]:
        """The nodes, by partition."""
        return list(self._nodes)

    def give(self, message: AppMessage) -> bool:
        """Have a node deal with a message, behind those that it has; False if there is no such node."""
        with self._changed:
            node = self._nodes.get(message.node)
            if node is None:
                return False
            node.waiting.append(message)
            if len(node.waiting) == 1:
                self._ready.append(message.node)
                self._changed.notify()
            return True

    def drop(self, ids: Collection[str]) -> None:
        """Nobody waits for what comes of these messages: those that were not begun are not, and who is at one stops."""
        with self._changed:
            for node_id, node in self._nodes.items():
                node.waiting = deque(
                    each for each in node.waiting if each.id not in ids or each.id in self._at_work
                )
                if not node.waiting and node_id in self._ready:
                    self._ready.remove(node_id)
            stuck = [process for id, process in self._at_work.items() if id in ids]
        for process in stuck:
            if process is not None:
                process.kill()

    def close(self) -> None:
        """Nobody works any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            at_work = list(self._at_work.values())
        for process in at_work:
            if process is not None:
                process.kill()
        for thread in self._threads:
            thread.join(_ENDED_S)

    def _serve(self) -> None:
        """One process and the messages that it is given, one after the other, for as long as there are any."""
        process: _Process | None = None
        try:
            while (found := self._next()) is not None:
                node_id, message = found
                node = self._nodes[node_id]
                try:
                    process = process or _Process()
                    with self._changed:
                        self._at_work[message.id] = process
                    process.load(self._setting)
                    reply, state = process.do(node_id, node.config, node.done, message, node.state)
                    node.state = state
                except TaskError as error:
                    self.failure, process = error, None
                    reply = reply_to(message, AppError(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, str(error)))
                except (EOFError, OSError):
                    assert process is not None  # it is what has ended
                    reply = reply_to(message, AppError(ErrorCode.CLIENT_APP_CRASHED, process.how_it_ended()))
                    log.warning("client_app_process_ended node=%d %s", node_id, process.how_it_ended())
                    process = None
                node.done += 1
                with self._changed:
                    self._at_work.pop(message.id, None)
                    node.waiting.popleft()
                    if node.waiting:
                        self._ready.append(node_id)
                        self._changed.notify()
                self._answered(reply)
        finally:
            if process is not None:
                process.close()

    def _next(self) -> tuple[int, AppMessage] | None:
        """The next message that somebody may begin with; None if that is all."""
        with self._changed:
            while not self._ready and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            node_id = self._ready.popleft()
            message = self._nodes[node_id].waiting[0]
            self._at_work[message.id] = None
            return node_id, message


class _Process:
    """A process for the ClientApp."""

    def __init__(self) -> None:
        mine, its = socket.socketpair()
        self._loaded = False
        self._end = mine
        self._frames = Frames(mine)
        self._process = subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
            [*python("fedge_sim.flower.worker"), str(its.fileno())],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        its.close()

    def load(self, setting: Setting) -> None:
        """It has the app from then on.

        Raises:
            TaskError: it cannot load it.
        """
        if self._loaded:
            return
        try:
            self._frames.send(setting.as_json())
            said = json.loads(self._frames.receive()[0])
        except (EOFError, OSError):
            raise TaskError(f"the app's process has ended while it loaded: {self.how_it_ended()}") from None
        if "failed" in said:
            self.close()
            raise TaskError(said["failed"])
        self._loaded = True

    def do(
        self, node: int, config: Settings, number: int, message: AppMessage, state: Content
    ) -> tuple[AppMessage, Content]:
        """The reply, and the node's state after it.

        Raises:
            EOFError, OSError: the process has ended.
        """
        about: Mapping[str, Any] = {"node": node, "config": dict(config), "number": number}
        self._frames.send(json.dumps(about).encode())
        self._frames.send_message(message)
        self._frames.send_message(AppMessage("", "query", 0, state))
        reply, kept = self._frames.receive_message(), self._frames.receive_message()
        assert not isinstance(kept.content, AppError)  # the process sends records
        return reply, kept.content

    def how_it_ended(self) -> str:
        """In words."""
        try:
            code = self._process.wait(_ENDED_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """At once, whatever it is at."""
        self._process.kill()

    def close(self) -> None:
        """It ends by itself when nobody talks to it any more."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()
        self.how_it_ended()
