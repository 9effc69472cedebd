"""Nodes of a Flower app: what each waits for, and the processes that run their ClientApps.

A node deals with one message at a time, in order. Its state is kept between them by whoever has started the pool, so
that any process can do the next, and one that dies takes nothing with it but what it was at.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from fedge.errors import TaskError
from fedge.records import AppError, AppMessage, Buffer, ErrorCode, reply_to
from fedge.wire.records import Packed
from fedge_client.apps.process import Config, Process, Setting

log = logging.getLogger(__name__)

_ENDED_S: Final = 10.0

Answered = Callable[[Packed], None]
"""Hears of each reply; on any thread."""


class Memory(Protocol):
    """Keeps the nodes' states, on any thread; of one node one thing at a time."""

    def state(self, node: int) -> Sequence[Buffer]:
        """As records are packed; nothing for a node that has none yet."""
        ...

    def keep(self, node: int, reply: Packed, state: memoryview) -> None:
        """What it is after a reply, which is not known to anybody yet."""
        ...


class Forgetful:
    """Keeps states for as long as this process lives."""

    def __init__(self) -> None:
        self._states: dict[int, memoryview] = {}

    def state(self, node: int) -> Sequence[Buffer]:
        return (self._states[node],) if node in self._states else ()

    def keep(self, node: int, reply: Packed, state: memoryview) -> None:
        self._states[node] = state


@dataclass(slots=True, eq=False)
class _Node:
    config: Config
    waiting: deque[Packed] = field(default_factory=deque)
    done: int = 0


class Pool:
    """Nodes by id, each with what an app finds in `context.node_config`, and `workers` processes that are started when
    there is work for them, or at once and with the app loaded if they are to be `warm`.

    `answered` is called with each reply. A process that cannot even load the app makes `failure` what it says.
    """

    def __init__(
        self,
        setting: Setting,
        nodes: Mapping[int, Config],
        *,
        workers: int,
        answered: Answered,
        memory: Memory | None = None,
        warm: bool = False,
    ) -> None:
        self._setting, self._answered, self._warm = setting, answered, warm
        self._memory = memory or Forgetful()
        self._nodes = {id: _Node(config) for id, config in nodes.items()}
        self._ready: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._begun: dict[str, Process | None] = {}
        """The messages that were taken, and the process that is at each, once it is."""
        self._called_off: set[str] = set()
        self._processes: set[Process] = set()
        self.failure: TaskError | None = None
        self._threads = [
            threading.Thread(target=self._serve, name=f"fedge-flower-{at}", daemon=True)
            for at in range(min(workers, len(nodes)))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ids(self) -> list[int]:
        """The nodes, in the order in which they were given."""
        return list(self._nodes)

    def give(self, packed: Packed) -> bool:
        """Have a node deal with a message, behind those that it has; False if there is no such node."""
        with self._changed:
            node = self._nodes.get(packed.about.node)
            if node is None:
                return False
            node.waiting.append(packed)
            if len(node.waiting) == 1:
                self._ready.append(packed.about.node)
                self._changed.notify()
            return True

    def drop(self, ids: Collection[str]) -> None:
        """Nobody waits for what comes of these messages: those that were not begun are not, and who is at one stops."""
        with self._changed:
            for node in self._nodes.values():
                node.waiting = deque(
                    each for each in node.waiting if each.about.id not in ids or each.about.id in self._begun
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
        process = self._warmed() if self._warm else None
        while (found := self._next()) is not None:
            node_id, packed = found
            node, message = self._nodes[node_id], packed.about
            try:
                if process is None:
                    process = self._started()
                process.load()  # which takes long, and is not ended for one message
                if self._is_wanted(message, process):
                    state = self._memory.state(node_id)
                    reply, after = process.do(node_id, node.config, node.done, packed, state)
                    if self._is_wanted(message, None):
                        self._memory.keep(node_id, reply, after)
                    else:
                        reply = _called_off(message)
                        self._without(process)  # it was ended for that
                        process = None
                else:
                    reply = _called_off(message)
            except TaskError as error:
                self.failure = error
                reason = "see the site's log" if self._setting.discreet else str(error)
                log.error("client_app_not_loaded reason=%s", error)
                reply = _error(message, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, reason)
                self._without(process)
                process = None
            except (EOFError, ConnectionError):
                how = process.how_it_ended() if process is not None else "it could not be started"
                log.warning("client_app_process_ended node=%d %s", node_id, how)
                reply = _error(message, ErrorCode.CLIENT_APP_CRASHED, how)
                self._without(process)
                process = None
            except Exception as error:  # whatever it is, the next messages are not to wait for this one
                log.exception("client_app_message_failed node=%d", node_id)
                reason = (
                    type(error).__name__ if self._setting.discreet else f"{type(error).__name__}: {error}"
                )
                reply = _error(message, ErrorCode.UNKNOWN, reason)
                self._without(process)
                process = None
            self._done(node_id, node, message)
            self._answered(reply)
        self._without(process)

    def _warmed(self) -> Process | None:
        """One that has the app; None if that fails, which the first message will be told, too."""
        process: Process | None = None
        try:
            process = self._started()
            process.load()
            return process
        except Exception:  # whatever it is, messages are to be answered
            log.exception("client_app_not_loaded")
            self._without(process)
            return None

    def _next(self) -> tuple[int, Packed] | None:
        """The next message that somebody may begin with; None if that is all."""
        with self._changed:
            while not self._ready and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            node_id = self._ready.popleft()
            packed = self._nodes[node_id].waiting[0]
            self._begun[packed.about.id] = None
            return node_id, packed

    def _is_wanted(self, message: AppMessage, process: Process | None) -> bool:
        """Whether it was not called off meanwhile: from now on that ends this process, if it is one."""
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

    def _started(self) -> Process:
        with self._changed:
            if self._closed:
                raise EOFError
            process = Process(self._setting)
            self._processes.add(process)
            return process

    def _without(self, process: Process | None) -> None:
        """A process ends; nobody has it any more."""
        if process is not None:
            process.close()
            with self._changed:
                self._processes.discard(process)


def _called_off(message: AppMessage) -> Packed:
    return _error(message, ErrorCode.UNKNOWN, "it was called off")


def _error(message: AppMessage, code: ErrorCode, reason: str) -> Packed:
    return Packed(reply_to(message, AppError(code, reason), now=time.time()))
