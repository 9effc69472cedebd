"""The agent's side of the worker: starts it, watches it, and starts it again when it breaks.

A worker that crashes, stops making progress or outgrows its memory is killed; the caller gets a typed
refusal, which travels to the coordinator, while the details stay in the site's own log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from fedge.errors import RefusedError, RemoteProtocolError
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import Array
from fedge.wire.codec import decode_refusal
from fedge_client import pipe_pb2 as pb
from fedge_client.framing import HEADER, check_length, frame
from fedge_client.segment import Segment
from fedge_client.settings import WorkerSettings

log = logging.getLogger(__name__)

_MEMORY_EVERY_S = 0.5
_END_S = 5.0


class Supervisor:
    """One worker process at a time, and the shared segments of up to `slots` runs."""

    def __init__(self, client_toml: Path, site: str, settings: WorkerSettings, *, slots: int) -> None:
        self._client_toml = client_toml
        self._site = site
        self._settings = settings
        self._segments = [(Segment.create(), Segment.create(), Segment.create()) for _ in range(slots)]
        self._loads: dict[str, pb.Load] = {}
        self._loaded: set[str] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()
        self._memory_broken = False

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def free_slot(self) -> int | None:
        """Segments that no run uses."""
        used = {load.slot for load in self._loads.values()}
        return next((slot for slot in range(len(self._segments)) if slot not in used), None)

    def vectors(self, slot: int, size: int) -> tuple[Array, Array]:
        """The shared model and update of a slot, float32[size] each."""
        model, update, _ = self._segments[slot]
        return model.vector(size, grow=True), update.vector(size, grow=True)

    def own(self, run_id: str, size: int) -> Array:
        """Room in a run's slot for what corrects its gradients, or for its personal layers, float32[size].

        Raises:
            RefusedError: CANCELLED; the run was released meanwhile.
        """
        load = self._loads.get(run_id)
        if load is None:
            raise RefusedError(Refusal(RefusalCode.CANCELLED, "the run was released meanwhile"))
        return self._segments[load.slot][2].vector(size, grow=True)

    async def load(self, load: pb.Load) -> pb.Loaded:
        """Have the worker import a run's task, its data and its model.

        Raises:
            RefusedError: it cannot, or it died trying.
        """
        async with self._turn:
            reply = await self._load(load)
            self._loads[load.run_id] = load
            return reply

    async def perform(self, message: pb.Perform, *, progress: Callable[[int, int], None]) -> pb.Finished:
        """Have the worker do an order on the vectors in its run's slot.

        Raises:
            RefusedError: the task failed, was cancelled, or the worker broke.
        """
        async with self._turn:
            load = self._loads.get(message.run_id)
            if load is None:
                raise RefusedError(Refusal(RefusalCode.CANCELLED, "the run was released meanwhile"))
            if self.pid is None or message.run_id not in self._loaded:
                await self._load(load)
            reply = await self._ask(pb.ToWorker(perform=message), progress=progress)
            if reply.WhichOneof("kind") != "finished":
                raise RemoteProtocolError(f"expected a finished order, found {reply.WhichOneof('kind')}")
            return reply.finished

    def cancel(self) -> None:
        """Ask the worker to drop what it is doing; the order then fails with CANCELLED."""
        self._tell(pb.ToWorker(cancel=pb.Cancel()))

    def release(self, run_id: str) -> None:
        """The run is over: the worker may forget it, and its slot is free."""
        self._loads.pop(run_id, None)
        if run_id in self._loaded:
            self._loaded.discard(run_id)
            self._tell(pb.ToWorker(release=pb.Release(run_id=run_id)))

    async def close(self) -> None:
        """End the worker and free the segments."""
        await self._end()
        for slot in self._segments:
            for segment in slot:
                segment.close()

    async def _load(self, load: pb.Load) -> pb.Loaded:
        if self.pid is None:
            await self._start()
        reply = await self._ask(pb.ToWorker(load=load))
        if reply.WhichOneof("kind") != "loaded":
            raise RemoteProtocolError(f"expected a loaded task, found {reply.WhichOneof('kind')}")
        self._loaded.add(load.run_id)
        return reply.loaded

    async def _start(self) -> None:
        await self._end()
        ours, theirs = socket.socketpair()
        descriptors = [segment.descriptor for slot in self._segments for segment in slot]
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fedge_client.worker",
                f"--socket={theirs.fileno()}",
                "--segments",
                *(str(descriptor) for descriptor in descriptors),
                f"--site={self._site}",
                "--",
                str(self._client_toml),
                pass_fds=(theirs.fileno(), *descriptors),
                stdin=asyncio.subprocess.DEVNULL,
                # Threads that wait by sleeping leave the cores to whatever else the device does.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1"},
            )
        finally:
            theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._memory_broken = False
        log.info("worker_started pid=%d", self._process.pid)
        ready = await self._next_message()
        if ready.WhichOneof("kind") != "ready":
            raise RemoteProtocolError(f"expected the worker to be ready, found {ready.WhichOneof('kind')}")

    async def _ask(
        self, message: pb.ToWorker, *, progress: Callable[[int, int], None] | None = None
    ) -> pb.FromWorker:
        """Send, and wait for the answer as long as there is progress."""
        self._tell(message)
        memory = asyncio.create_task(self._watch_memory()) if self._settings.memory_mb else None
        try:
            while True:
                reply = await self._next_message()
                match reply.WhichOneof("kind"):
                    case "progress":
                        if progress is not None:
                            progress(reply.progress.done, reply.progress.total)
                    case "failed":
                        log.warning("task_failed detail=%s", reply.failed.detail)
                        raise RefusedError(decode_refusal(reply.failed.refusal))
                    case _:
                        return reply
        finally:
            if memory is not None:
                memory.cancel()

    async def _next_message(self) -> pb.FromWorker:
        assert self._reader is not None  # only asked of a worker that was started
        try:
            async with asyncio.timeout(self._settings.hang_s):
                (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                return pb.FromWorker.FromString(await self._reader.readexactly(check_length(length)))
        except TimeoutError:
            await self._end()
            raise RefusedError(
                Refusal(
                    RefusalCode.WORKER_HUNG,
                    f"the worker made no progress for {self._settings.hang_s:g} s and was killed",
                )
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise RefusedError(await self._post_mortem()) from None

    async def _post_mortem(self) -> Refusal:
        """Why the worker is gone."""
        assert self._process is not None  # it was started, or nothing would have been read
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _END_S)
        code = self._process.returncode
        broke_memory, limit = self._memory_broken, self._settings.memory_mb
        await self._end()
        if broke_memory:
            return Refusal(RefusalCode.OUT_OF_MEMORY, f"the worker used more than {limit} MB and was killed")
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (the system may be out of memory)" if -code == signal.SIGKILL else ""
            return Refusal(RefusalCode.WORKER_CRASHED, f"the worker was ended by {name}{hint}")
        return Refusal(RefusalCode.WORKER_CRASHED, f"the worker ended by itself with exit code {code}")

    async def _watch_memory(self) -> None:
        assert self._settings.memory_mb is not None  # asked only then
        assert self.pid is not None
        process = psutil.Process(self.pid)
        limit = self._settings.memory_mb << 20
        with suppress(psutil.NoSuchProcess):
            while process.memory_info().rss <= limit:  # noqa: ASYNC110  # nobody signals it
                await asyncio.sleep(_MEMORY_EVERY_S)
            self._memory_broken = True
            log.warning("worker_over_memory pid=%d limit_mb=%d", process.pid, self._settings.memory_mb)
            process.kill()

    def _tell(self, message: pb.ToWorker) -> None:
        if self._writer is not None:
            self._writer.write(frame(message.SerializeToString()))

    async def _end(self) -> None:
        """Kill the worker, if there is one, and forget what it had loaded."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._process = self._reader = self._writer = None
        self._loaded.clear()
