"""The nodes of a simulated Flower app: who they are, what each waits for, and the processes that run their ClientApps.

A node deals with one message at a time, in order; its state is kept here between them, so that any process can do the
next, and one that dies takes nothing with it but what it was at.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fedge.errors import TaskError
from fedge.records import AppError, AppMessage, Buffer, Content
from fedge.seeds import derive_seed
from fedge.wire import records
from fedge_flower.app import Settings
from fedge_flower.internals import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, ErrorCode
from fedge_flower.node import reply_to
from fedge_sim.flower.frames import Frames
from fedge_sim.python import python

log = logging.getLogger(__name__)

_ENDED_S: Final = 10.0
_KILLED: Final = f"killed by signal {signal.SIGKILL:d}"

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


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A message, and how it goes to a process."""

    message: AppMessage
    header: bytes
    buffers: Sequence[Buffer]

    @classmethod
    def of(cls, message: AppMessage) -> Packed:
        """
        Raises:
            LimitError, ValueError: it holds more, or something else, than a message may.
        """
        header, buffers = records.encode(message)
        return cls(replace(message, content={}), header, buffers)


@dataclass(slots=True, eq=False)
class _Node:
    config: Settings
    state: Content = field(default_factory=dict)
    waiting: deque[Packed] = field(default_factory=deque)
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
        self._begun: dict[str, _Process | None] = {}
        """The messages that were taken, and the process that is at each, once it is."""
        self._called_off: set[str] = set()
        self._processes: set[_Process] = set()
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

    def give(self, packed: Packed) -> bool:
        """Have a node deal with a message, behind those that it has; False if there is no such node."""
        with self._changed:
            node = self._nodes.get(packed.message.node)
            if node is None:
                return False
            node.waiting.append(packed)
            if len(node.waiting) == 1:
                self._ready.append(packed.message.node)
                self._changed.notify()
            return True

    def drop(self, ids: Collection[str]) -> None:
        """Nobody waits for what comes of these messages: those that were not begun are not, and who is at one stops."""
        with self._changed:
            for node in self._nodes.values():
                node.waiting = deque(
                    each
                    for each in node.waiting
                    if each.message.id not in ids or each.message.id in self._begun
                )
            self._ready = deque(each for each in self._ready if self._nodes[each].waiting)
            for id, process in self._begun.items():
                if id in ids:
                    self._called_off.add(id)
                    if process is not None:
                        process.kill()

    def close(self) -> None:
        """Nobody works any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join(_ENDED_S)

    def _serve(self) -> None:
        """One process and the messages that it is given, one after the other, for as long as there are any."""
        process: _Process | None = None
        while (found := self._next()) is not None:
            node_id, packed = found
            node, message = self._nodes[node_id], packed.message
            try:
                if process is None:
                    process = self._started()
                process.load(self._setting)  # which takes long, and is not ended for one message
                if self._is_wanted(message, process):
                    reply, node.state = process.do(node_id, node.config, node.done, packed, node.state)
                else:
                    reply = reply_to(message, AppError(ErrorCode.UNKNOWN, "it was called off"))
            except TaskError as error:
                self.failure = error
                reply = reply_to(message, AppError(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, str(error)))
                self._without(process)
                process = None
            except (EOFError, ConnectionError):
                how = process.how_it_ended() if process is not None else "it could not be started"
                log.warning("client_app_process_ended node=%d %s", node_id, how)
                reply = reply_to(message, AppError(ErrorCode.CLIENT_APP_CRASHED, how))
                self._without(process)
                process = None
            except Exception as error:  # whatever it is, the next messages are not to wait for this one
                log.exception("client_app_message_failed node=%d", node_id)
                reply = reply_to(message, AppError(ErrorCode.UNKNOWN, f"{type(error).__name__}: {error}"))
                self._without(process)
                process = None
            self._done(node_id, node, message)
            self._answered(reply)
        self._without(process)

    def _next(self) -> tuple[int, Packed] | None:
        """The next message that somebody may begin with; None if that is all."""
        with self._changed:
            while not self._ready and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            node_id = self._ready.popleft()
            packed = self._nodes[node_id].waiting[0]
            self._begun[packed.message.id] = None
            return node_id, packed

    def _is_wanted(self, message: AppMessage, process: _Process) -> bool:
        """Whether it was not called off meanwhile: from now on that ends the process."""
        with self._changed:
            if self._closed or message.id in self._called_off:
                return False
            self._begun[message.id] = process
            return True

    def _done(self, node_id: int, node: _Node, message: AppMessage) -> None:
        with self._changed:
            del self._begun[message.id]
            self._called_off.discard(message.id)
            node.done += 1
            node.waiting.popleft()
            if node.waiting:
                self._ready.append(node_id)
                self._changed.notify()

    def _started(self) -> _Process:
        with self._changed:
            if self._closed:
                raise EOFError
            process = _Process()
            self._processes.add(process)
            return process

    def _without(self, process: _Process | None) -> None:
        """A process ends; nobody has it any more."""
        if process is not None:
            process.close()
            with self._changed:
                self._processes.discard(process)


class _Process:
    """A process for the ClientApp, and those that it starts: a group of their own, which a terminal's Ctrl-C does not
    reach.

    Raises:
        OSError: there is no room for another.
    """

    def __init__(self) -> None:
        mine, its = socket.socketpair()
        self._end, self._loaded = mine, False
        try:
            self._process = subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
                [*python("fedge_sim.flower.worker"), str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
                start_new_session=True,
            )
        except OSError:
            mine.close()
            raise
        finally:
            its.close()
        self._frames = Frames(mine, is_there=lambda: self._process.poll() is None)

    def load(self, setting: Setting) -> None:
        """It has the app from then on.

        Raises:
            TaskError: it cannot load it.
            EOFError, OSError: it was ended.
        """
        if self._loaded:
            return
        self._frames.send(setting.as_json())
        try:
            said = json.loads(self._frames.receive()[0])
        except EOFError:
            how = self.how_it_ended()
            if how == _KILLED:
                raise
            raise TaskError(f"the app's process has ended while it loaded: {how}") from None
        if "failed" in said:
            raise TaskError(said["failed"])
        self._loaded = True

    def do(
        self, node: int, config: Settings, number: int, packed: Packed, state: Content
    ) -> tuple[AppMessage, Content]:
        """The reply, and the node's state after it.

        Raises:
            EOFError, OSError: the process has ended.
        """
        about: Mapping[str, Any] = {"node": node, "config": dict(config), "number": number}
        self._frames.send(json.dumps(about).encode())
        self._frames.send(packed.header, packed.buffers)
        self._frames.send(*records.encode(AppMessage("", "query", 0, state)))
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
        """At once, whatever it and those that it has started are at."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """It ends by itself when nobody talks to it any more; what it has started ends with it."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()
        if self._process.poll() is None:
            self.how_it_ended()
        self.kill()
