"""The workers of a simulation: processes that train one client after another, each on a core of its own.

This module, run by itself, imports torch and the task once and divides itself into as many as were asked for.
Vectors are in memory that it shares with the simulation, which sends one line of JSON for each client's work, and gets
one back. A closed socket is the end of both.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import torch

from fedge.errors import FedgeError, LimitError
from fedge.events import OrderId, Send
from fedge.exact import mean_of_rows
from fedge.run import RunConfig
from fedge.strategy import WorkKind
from fedge.task import Task
from fedge.vector import Array
from fedge_client.segment import Segment
from fedge_sim.clients import Clients
from fedge_sim.engines.setting import loaded
from fedge_sim.memory import keep_freed
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts
from fedge_sim.variates import Given

MAX_LINE_BYTES: Final = 1 << 20
"""Of a message: an order is short, metrics are bounded by what a gate lets pass."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shared:
    """What the simulation shares with its workers: a socket for each, the model, a row for each client's vector, their
    mean, and a row for what each client has of its own."""

    sockets: tuple[int, ...]
    model: Segment
    mean: Segment
    rows: Segment
    own: Segment

    def open(self, rows: int, size: int, own: int) -> Vectors:
        """What is in it."""
        return Vectors(
            self.model.vector(size),
            self.mean.vector(size),
            self.rows.vector(rows * size).reshape(rows, size),
            self.own.vector(rows * own).reshape(rows, own),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """`model` and `mean` are float32[size], `rows` float32[clients, size], `own` float32[clients, elements], of which
    there may be none."""

    model: Array
    mean: Array
    rows: Array
    own: Array


class Lines:
    """One JSON object a line, over a socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._pending = b""

    def send(self, message: Message) -> None:
        self._end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """The next one; None when the other end is closed.

        Raises:
            LimitError: it is too long.
        """
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_LINE_BYTES:
                raise LimitError(f"expected a message of at most {MAX_LINE_BYTES} bytes, found a longer one")
            read = self._end.recv(1 << 16)
            if not read:
                return None
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def pending(self) -> bool:
        """Whether there is one that was read already."""
        return b"\n" in self._pending


def divide(
    control: Lines, shared: Shared, setting: Message, load: Callable[[], tuple[RunConfig, Task]]
) -> None:
    """Be as many workers as there are sockets, and watch them: how each ends is said on `control`."""
    os.setpgid(0, 0)  # an interrupt is for the simulation, which closes the sockets
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    keep_freed()
    try:
        run, task = load()
        given = Given()
        clients = _clients(run, task, setting, given)
    except FedgeError as error:
        control.send({"failed": str(error)})
        return
    workers: dict[int, int] = {}
    for number, descriptor in enumerate(shared.sockets):
        sys.stdout.flush()
        if (process := os.fork()) == 0:
            _be(number, descriptor, shared, clients, given, setting)
        workers[process] = number
    for descriptor in shared.sockets:
        os.close(descriptor)  # so that a worker that ends is seen to have ended
    while workers:
        process, status = os.wait()
        if process in workers:
            ended = {"worker": workers.pop(process), "exit": os.waitstatus_to_exitcode(status)}
            with suppress(OSError):  # nobody asks any more
                control.send(ended)


def _be(
    number: int, descriptor: int, shared: Shared, clients: Clients, given: Given, setting: Message
) -> None:
    """A worker's life; does not return."""
    code = 1
    try:
        for other in shared.sockets:
            if other != descriptor:
                os.close(other)
        lines = Lines(socket.socket(fileno=descriptor))
        vectors = shared.open(setting["rows"], setting["size"], setting["own"])
        _say_whether_it_can(lines)
        for message in _until_closed(lines):
            if "weights" in message:
                _mean(message, vectors)
                lines.send({"done": True})
            else:
                client, row = message["client"], message["row"]
                given.rows = {client: vectors.own[row]} if message["own"] else {}
                lines.send(_reply(clients, message, vectors))
        code = 0
    except (BrokenPipeError, ConnectionResetError):
        code = 0  # nobody waits for it
    finally:
        sys.stderr.flush()
        os._exit(code)


def _until_closed(lines: Lines) -> Iterator[Message]:
    while (message := lines.receive()) is not None:
        yield message


def _say_whether_it_can(lines: Lines) -> None:
    """torch's gradients may not work in a process that was divided from one that has computed some on a device."""
    try:
        torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]  # torch ships no annotation
    except RuntimeError as error:
        lines.send({"unsuited": str(error)})
    else:
        lines.send({"ready": os.getpid()})


def _reply(clients: Clients, message: Message, vectors: Vectors) -> Message:
    kind: WorkKind = message["kind"]
    order = OrderId(kind, message["round"], message["attempt"])
    row = vectors.rows[message["row"]]
    done = clients.attempt(Send(message["client"], order), vectors.model, out=row)
    if done is None:
        return {"row": message["row"], "done": False}
    return {
        "row": message["row"],
        "done": True,
        "num_examples": done.num_examples,
        "metrics": {**done.metrics},
    }


def _mean(message: Message, vectors: Vectors) -> None:
    """A part of the elements of a mean, which do not depend on each other."""
    part, weights = slice(message["from"], message["to"]), message["weights"]
    vectors.mean[part] = mean_of_rows(vectors.rows[: len(weights), part], weights)


def _clients(run: RunConfig, task: Task, setting: Message, given: Given) -> Clients:
    """All of them; their accounts are the simulation's, and here only say what noise there is."""
    population = Population.of(run, task, count=run.simulation.clients)
    return Clients(run, task, population, Accounts(run, setting["kind"]), given)


def main() -> None:
    """As `engines.processes` starts it, with descriptors: control, model, mean, rows, own, and the workers' sockets."""
    os.dup2(2, 1)  # what the task's code prints is not the output of whoever asked for the simulation
    control_fd, model, mean, rows, own, *sockets = map(int, sys.argv[1:])
    control = Lines(socket.socket(fileno=control_fd))
    setting = control.receive()
    if setting is None:
        return

    segments = (Segment(each) for each in (model, mean, rows, own))
    shared = Shared(tuple(sockets), *segments)
    divide(control, shared, setting, lambda: loaded(setting))


if __name__ == "__main__":
    main()
