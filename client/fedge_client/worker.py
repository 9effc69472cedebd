"""The worker process: imports the task and torch, trains, and owns neither a key nor a connection.

Started by the agent as `python -m fedge_client.worker`, it ends with it: a closed socket is the signal.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from fedge.errors import FedgeError, LayoutError, RefusedError, TaskError
from fedge.privacy.secure import KEY_BYTES, SecureSource
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.seeds import work_seed
from fedge.task import OwnTask, Site, Task, check_shared, check_unit, load_any_task
from fedge.vector import Array
from fedge.wire.codec import decode_layout, decode_order_id, decode_work, encode_metrics, encode_refusal
from fedge_client import pipe_pb2 as pb
from fedge_client.framing import HEADER, check_length, frame
from fedge_client.local import Local
from fedge_client.protection import decode_level, encode_releases
from fedge_client.segment import Segment
from fedge_client.settings import ClientSettings, load_client

if TYPE_CHECKING:
    from fedge_client.torch.private.steps import Private

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 0.5
M = TypeVar("M", pb.Load, pb.Perform)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's task, loaded and found to fit."""

    local: Local
    seed: int
    slot: int


class _AgentGoneError(Exception):
    """The agent closed its end: there is nobody to work for."""


class Worker:
    """Answers the agent's messages one at a time."""

    def __init__(
        self,
        agent: socket.socket,
        slots: list[tuple[Segment, Segment, Segment]],
        site: str,
        settings: ClientSettings,
        folder: Path,
    ) -> None:
        self._agent = agent
        self._slots = slots
        self._site = Site(site, MappingProxyType(settings.data.table))
        self._folder = folder / settings.task.path
        self._threads = settings.worker.threads
        self._runs: dict[str, _Run] = {}
        self._last_progress = 0.0

    def serve(self) -> None:
        """Work until the agent is gone."""
        self._send(pb.FromWorker(ready=pb.Ready()))
        while True:
            message = self._receive()
            match message.WhichOneof("kind"):
                case "load":
                    self._answer(self._load, message.load)
                case "perform":
                    self._answer(self._perform, message.perform)
                case "release":
                    self._runs.pop(message.release.run_id, None)
                case _:
                    pass  # a cancel that came after its work was done

    def _answer(self, work: Callable[[M], pb.FromWorker], message: M) -> None:
        """Do it, and turn whatever the user's code raises into a typed failure; details stay on the site."""
        try:
            reply = work(message)
        except _AgentGoneError:
            raise
        except RefusedError as error:
            why = "".join(traceback.format_exception(error.__cause__)) if error.__cause__ else str(error)
            reply = _failure(error.refusal, why)
        except LayoutError as error:
            reply = _failure(Refusal(RefusalCode.LAYOUT_MISMATCH, str(error)), str(error))
        except MemoryError:
            refusal = Refusal(RefusalCode.OUT_OF_MEMORY, "the task ran out of memory")
            reply = _failure(refusal, traceback.format_exc())
        except FedgeError as error:
            # Only the kind of the user's error is reported upward: its text may quote data.
            cause = error.__cause__
            kind = type(cause).__name__ if cause is not None else "see the site's log"
            refusal = Refusal(RefusalCode.TASK_FAILED, f"the task's code failed ({kind})")
            reply = _failure(refusal, traceback.format_exc())
        except Exception as error:  # noqa: BLE001  # user code may raise anything
            refusal = Refusal(RefusalCode.TASK_FAILED, f"the task's code failed ({type(error).__name__})")
            reply = _failure(refusal, traceback.format_exc())
        self._send(reply)

    def _load(self, load: pb.Load) -> pb.FromWorker:
        try:
            task = load_any_task(load.task, path=self._folder)
        except TaskError as error:
            refusal = Refusal(
                RefusalCode.TASK_UNAVAILABLE, f"task {load.task!r} cannot be imported on this site"
            )
            return _failure(refusal, str(error))
        work = decode_work(load.work)
        local = self._own(task, work, load) if isinstance(task, OwnTask) else self._torch(task, work, load)
        self._runs[load.run_id] = _Run(local, load.seed, load.slot)
        train, test = local.examples
        first = local.first_layers
        loaded = pb.Loaded(
            run_id=load.run_id,
            train_examples=train,
            test_examples=test,
            personal=len(first) if first is not None else 0,
        )
        return pb.FromWorker(loaded=loaded)

    def _torch(self, task: Task, work: Work, load: pb.Load) -> Local:
        from fedge_client.torch.local import TorchLocal  # torch takes seconds to import: only for real work

        local = TorchLocal(task, work, seed=load.seed, threads=self._threads)
        _check_layout(local, load)
        local.load(self._site, private=load.private)
        return local

    def _own(self, task: OwnTask, work: Work, load: pb.Load) -> Local:
        """One that trains by itself: nobody can see to it that each example is protected."""
        check_unit(task, "example" if load.private else "none")
        check_shared(task, work.personal)
        local: Local = task.local(self._site, work)
        _check_layout(local, load)
        return local

    def _perform(self, perform: pb.Perform) -> pb.FromWorker:
        run = self._runs[perform.run_id]
        order = decode_order_id(perform.id)
        size = run.local.layout.size
        shared_model, shared_update, _ = self._slots[run.slot]
        correction, layers = self._own_vectors(run, perform.own)
        done = run.local.do(
            order,
            seed=work_seed(run.seed, site=self._site.name, kind=order.kind, round=order.round),
            model=shared_model.vector(size),
            out=shared_update.vector(size),
            private=self._private(perform),
            progress=self._progress,
            correction=correction,
            layers=layers,
        )
        return pb.FromWorker(
            finished=pb.Finished(
                num_examples=done.num_examples,
                metrics=encode_metrics(done.metrics),
                releases=encode_releases(done.mechanism),
            )
        )

    def _own_vectors(self, run: _Run, own: pb.Own.ValueType) -> tuple[Array | None, Array | None]:
        """What corrects the gradients, and the personal layers, whichever is in the third segment."""
        segment, first = self._slots[run.slot][2], run.local.first_layers
        if own == pb.OWN_CORRECTION:
            return segment.vector(run.local.layout.trainable_size), None
        if own == pb.OWN_NOTHING or first is None:
            return None, None
        layers = segment.vector(len(first))
        if own == pb.OWN_FIRST_LAYERS:
            layers[:] = first
        return None, layers

    @staticmethod
    def _private(perform: pb.Perform) -> Private | None:
        """What the gate demands, with a key for this order's noise that nobody else ever has."""
        if not perform.HasField("privacy"):
            return None
        from fedge_client.torch.private.steps import Private  # and torch, which not every task needs

        return Private(decode_level(perform.privacy), SecureSource(os.urandom(KEY_BYTES)))

    def _progress(self, done: int, total: int) -> None:
        """Called after every step: look for a cancel, and tell the agent now and then."""
        if select.select([self._agent], [], [], 0)[0]:
            message = self._receive()
            if message.WhichOneof("kind") == "cancel":
                raise RefusedError(Refusal(RefusalCode.CANCELLED, "the work was cancelled"))
            if message.WhichOneof("kind") == "release":
                self._runs.pop(message.release.run_id, None)
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_EVERY_S:
            self._last_progress = now
            self._send(pb.FromWorker(progress=pb.Progress(done=done, total=total)))

    def _send(self, message: pb.FromWorker) -> None:
        try:
            self._agent.sendall(frame(message.SerializeToString()))
        except OSError:
            raise _AgentGoneError from None

    def _receive(self) -> pb.ToWorker:
        (length,) = HEADER.unpack(self._read(HEADER.size))
        return pb.ToWorker.FromString(self._read(check_length(length)))

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                more = self._agent.recv(count - len(data))
            except OSError:
                more = b""
            if not more:
                raise _AgentGoneError
            data += more
        return bytes(data)


def _check_layout(local: Local, load: pb.Load) -> None:
    """
    Raises:
        RefusedError: LAYOUT_MISMATCH; the run's model is another than this site's.
    """
    difference = decode_layout(load.layout).difference(local.layout)
    if difference:
        message = f"this site's model differs from the run's: {difference}"
        raise RefusedError(Refusal(RefusalCode.LAYOUT_MISMATCH, message))


def _failure(refusal: Refusal, detail: str) -> pb.FromWorker:
    printable = detail[-16_000:].encode(errors="replace").decode()  # a file's name may be no Unicode
    return pb.FromWorker(failed=pb.Failed(refusal=encode_refusal(refusal), detail=printable))


def _end_with(agent: socket.socket) -> None:
    """Wait until the agent is gone, and end at once: the task's code may not look up for hours, or ever."""
    hung_up = select.poll()
    hung_up.register(agent, 0)  # not to read: only POLLHUP, which needs no asking
    hung_up.poll()
    os._exit(0)


def main() -> None:
    """Parse what the agent passes, and serve it."""
    parser = argparse.ArgumentParser(prog="fedge_client.worker", description=__doc__)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--segments", type=int, nargs="+", required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("client_toml", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the agent decides
    sys.stdout = sys.stderr  # whatever a task prints is a log
    settings = load_client(arguments.client_toml)
    segments = [Segment(descriptor) for descriptor in arguments.segments]
    slots = list(zip(segments[::3], segments[1::3], segments[2::3], strict=True))
    agent = socket.socket(fileno=arguments.socket)
    threading.Thread(target=_end_with, args=(agent,), daemon=True).start()
    worker = Worker(agent, slots, arguments.site, settings, arguments.client_toml.parent.resolve())
    try:
        worker.serve()
    except _AgentGoneError:
        sys.exit(0)


if __name__ == "__main__":
    main()
