"""The crew of several processes: a warm worker on each core, and vectors in memory that all of them share.

Which worker does what depends on who is free; what comes of it does not. Each uses one thread, whatever their number,
so that the results are the same bits on two cores and on twenty.
"""

from __future__ import annotations

import multiprocessing.context
import os
import selectors
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedge.errors import ConfigError, RunError
from fedge.events import Send
from fedge.python import python
from fedge.run import RunConfig
from fedge.strategy import WorkKind
from fedge.task import Task
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_client.segment import Segment
from fedge_sim.engines.crew import Done, UnsuitedError
from fedge_sim.engines.setting import setting_of
from fedge_sim.engines.worker import Lines, Shared, divide
from fedge_sim.variates import Given, Own

MAX_ROWS_BYTES: Final = 1 << 28
"""Of vectors at once; a row for each worker there is in any case."""

_MOST_ROWS: Final = 1024
_AT_ONCE: Final = 2
"""Orders that a worker has, so that it need not wait for the next."""

_SAID_S: Final = 5.0
"""For whoever watches the workers to say how one ended."""

_ENDED_S: Final = 10.0
"""For them to end after their sockets are closed, in the middle of a client's work at worst."""

Process = multiprocessing.context.ForkProcess


class Processes:
    """Workers, from the moment that they are started: they import torch and the task while the simulation goes on.

    `task` is what the run names, imported from `folder`; else it is `own`, made in this process, which is then divided.

    Raises:
        UnsuitedError: this system cannot divide a process.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        kind: WorkKind,
        size: int,
        workers: int,
        vectors: Own | None = None,
        folder: Path | None = None,
        own: Task | None = None,
    ) -> None:
        if not hasattr(os, "fork"):
            raise UnsuitedError("this system cannot divide a process")
        self._size = size
        self.workers = workers
        self._rows = min(max(workers, MAX_ROWS_BYTES // (4 * size)), _MOST_ROWS, run.simulation.clients)
        self._own = vectors if vectors is not None else Given()
        self._model, self._mean, self._vectors, self._theirs = (Segment.create() for _ in range(4))
        for each in (self._model, self._mean):
            each.vector(size, grow=True)
        self._matrix = self._vectors.vector(self._rows * size, grow=True).reshape(self._rows, size)
        pairs = [socket.socketpair() for _ in range(workers + 1)]
        self._control, *self._ends = (Lines(mine) for mine, _ in pairs)
        self._sockets = [mine for mine, _ in pairs]
        self._busy = [0] * workers
        self._ready = False
        width = self._own.size
        self._own_rows = self._theirs.vector(self._rows * width, grow=True).reshape(self._rows, width)
        numbers = {"size": size, "rows": self._rows, "own": width}
        setting = {**setting_of(run, kind=kind, folder=folder), **numbers}
        theirs = [its for _, its in pairs]
        segments = self._model, self._mean, self._vectors, self._theirs
        shared = Shared(tuple(its.fileno() for its in theirs[1:]), *segments)
        if own is None:
            self._process: Process | subprocess.Popen[bytes] = _started(theirs[0].fileno(), shared)
            self._control.send(setting)
        else:
            control = Lines(theirs[0])
            self._process = _divided(
                self._sockets, lambda: divide(control, shared, setting, lambda: (run, own))
            )
        for its in theirs:
            its.close()

    @property
    def most(self) -> int:
        return self._rows

    def does(self, kind: WorkKind) -> bool:
        return True

    def work(self, sends: Sequence[Send], model: Array) -> Done:
        if not self._ready:
            self._wait_until_ready()
        self._model.vector(self._size)[:] = model
        waiting = deque(enumerate(sends))
        outcomes: list[Outcome | None] = [None] * len(sends)
        with selectors.DefaultSelector() as selector:
            for number, end in enumerate(self._sockets[1:]):
                selector.register(end, selectors.EVENT_READ, number)
            for number in [*range(self.workers)] * _AT_ONCE:
                self._give(number, waiting)
            while any(self._busy):
                for key, _ in selector.select():
                    self._hear(key.data, outcomes)
                    while self._ends[key.data].pending():
                        self._hear(key.data, outcomes)
                    while self._busy[key.data] < _AT_ONCE and waiting:
                        self._give(key.data, waiting)
        if sends[0].order.kind == "train" and self._own.size:
            for row, (send, outcome) in enumerate(zip(sends, outcomes, strict=True)):
                if outcome is not None:
                    self._own.learned(send.client, send.order, self._own_rows[row].copy())
        return outcomes, self._matrix[: len(sends)]

    def mean(self, weights: Sequence[int]) -> Array | None:
        """Each worker makes a part of it."""
        cuts = [self._size * number // self.workers for number in range(self.workers + 1)]
        for number, (start, stop) in enumerate(pairwise(cuts)):
            if stop > start:
                self._ask(number, {"weights": [*weights], "from": start, "to": stop})
        for number, (start, stop) in enumerate(pairwise(cuts)):
            if stop > start:
                self._answer(number)
        return self._mean.vector(self._size).copy()

    def close(self) -> None:
        """End the workers, who finish the client that they are at, for so long as that is bearable."""
        for end in self._sockets:
            # Not only closed: another simulation of this process may have handed it down to its own workers.
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        _end(self._process)
        self._matrix = self._own_rows = np.empty((0, 0), np.float32)
        for segment in (self._model, self._mean, self._vectors, self._theirs):
            segment.close()

    def _give(self, number: int, waiting: deque[tuple[int, Send]]) -> None:
        """Tell a worker what to do next."""
        if not waiting:
            return
        row, send = waiting.popleft()
        order = send.order
        own = self._own.of(send.client, order)
        if own is not None:
            self._own_rows[row] = own
        message = {"row": row, "client": send.client, "kind": order.kind, "own": own is not None}
        self._ask(number, message | {"round": order.round, "attempt": order.attempt})
        self._busy[number] += 1

    def _hear(self, number: int, outcomes: list[Outcome | None]) -> None:
        """Take note of what a worker has done."""
        message = self._answer(number)
        self._busy[number] -= 1
        if message["done"]:
            outcomes[message["row"]] = Outcome(message["num_examples"], message["metrics"])

    def _ask(self, number: int, message: Mapping[str, Any]) -> None:
        try:
            self._ends[number].send(message)
        except OSError:
            raise self._lost(number) from None

    def _answer(self, number: int) -> Mapping[str, Any]:
        try:
            message = self._ends[number].receive()
        except ConnectionResetError:
            message = None
        if message is None:
            raise self._lost(number)
        return message

    def _wait_until_ready(self) -> None:
        for number in range(self.workers):
            message = self._answer(number)
            if "unsuited" in message:
                raise UnsuitedError(
                    "the task was given as an object to a process that torch does not let be divided "
                    f"({message['unsuited'][:200]}): put the task in a module and give its name (run.task)"
                )
        self._ready = True

    def _lost(self, number: int) -> RunError | ConfigError:
        """Why a worker is not there any more."""
        self._sockets[0].settimeout(_SAID_S)
        message: Mapping[str, Any] | None = None
        with suppress(OSError):
            message = self._control.receive()
        if message is not None and "failed" in message:
            return ConfigError(f"the simulation's workers cannot begin: {message['failed']}")
        how = f"with exit code {message['exit']}" if message is not None else "without a word"
        if message is not None and message["exit"] == -9:
            how = "by SIGKILL, as a system does that is out of memory (try fewer --workers)"
        return RunError(f"a worker of the simulation ended {how}; what it was working on is not known")


def _started(control: int, shared: Shared) -> subprocess.Popen[bytes]:
    """The process that imports everything and divides itself."""
    segments = shared.model, shared.mean, shared.rows, shared.own
    descriptors = [control, *(each.descriptor for each in segments), *shared.sockets]
    return subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
        python("fedge_sim.engines.worker", *map(str, descriptors)),
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
    )


def _divided(mine: Sequence[socket.socket], live: Callable[[], None]) -> Process:
    """A copy of this process, which knows a task that no other could import."""

    def begin() -> None:
        for end in mine:
            end.close()
        live()

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    return process


def _end(process: Process | subprocess.Popen[bytes]) -> None:
    """Wait for it to end by itself; then end it, and the workers, who are of its group."""
    if isinstance(process, Process):
        process.join(_ENDED_S)
        ended = process.exitcode is not None
    else:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDED_S)
        ended = process.returncode is not None
    if ended or process.pid is None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join() if isinstance(process, Process) else process.wait()
