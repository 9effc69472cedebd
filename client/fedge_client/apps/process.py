"""A process for a ClientApp, and those that it starts: it is told the app once, and then a message at a time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final

import psutil

from fedge.errors import TaskError
from fedge.python import python
from fedge.records import Buffer
from fedge.wire.records import Packed
from fedge_client.apps.frames import Frames

Config = Mapping[str, bool | int | float | str]

_ENDED_S: Final = 10.0
_KILLED: Final = f"killed by signal {signal.SIGKILL:d}"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a process is told first. `config` is the app's `run_config`.

    With a `seed` global generators begin anew at each message. `discreet` are processes whose errors say no more than
    their type: what an exception says may be of the data.
    """

    folder: str
    run_id: int
    config: Config
    seed: int | None = None
    discreet: bool = False
    threads: int = 1
    load_s: float = 900.0
    memory_mb: int | None = None


class Process:
    """In a group of its own, which a terminal's Ctrl-C does not reach.

    Raises:
        OSError: there is no room for another.
    """

    def __init__(self, setting: Setting) -> None:
        mine, its = socket.socketpair()
        self._end, self._setting = mine, setting
        self._loaded = self._too_large = self._too_slow = False
        threads = os.environ.get("OMP_NUM_THREADS", str(setting.threads))
        try:
            self._process = subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
                [*python("fedge_client.apps.worker"), str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": threads},
                start_new_session=True,
            )
        except OSError:
            mine.close()
            raise
        finally:
            its.close()
        self._frames = Frames(mine, is_there=self._is_there)

    def load(self) -> None:
        """It has the app from then on.

        Raises:
            TaskError: it cannot load it.
            EOFError, OSError: it was ended.
        """
        if self._loaded:
            return
        self._frames.tell(asdict(self._setting))
        deadline = threading.Timer(self._setting.load_s, self._give_up)
        deadline.start()
        try:
            said = self._frames.hear()
        except EOFError:
            how = self.how_it_ended()
            if self._too_slow:
                how = f"it took longer than {self._setting.load_s:g} s"
            elif how == _KILLED:
                raise
            raise TaskError(f"the app's process has ended while it loaded: {how}") from None
        finally:
            deadline.cancel()
        if "failed" in said:
            raise TaskError(said["failed"])
        self._loaded = True

    def do(
        self, node: int, config: Config, number: int, packed: Packed, state: Sequence[Buffer]
    ) -> tuple[Packed, memoryview]:
        """The reply, and the node's state after it, as records are packed.

        Raises:
            EOFError, OSError: the process has ended.
        """
        self._frames.tell({"node": node, "config": dict(config), "number": number})
        self._frames.send(packed)
        self._frames.send_bytes(state)
        return self._frames.receive(), self._frames.receive_bytes()

    def how_it_ended(self) -> str:
        """In words."""
        try:
            code = self._process.wait(_ENDED_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        if self._too_large:
            return f"it used more than {self._setting.memory_mb} MB of memory"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _give_up(self) -> None:
        self._too_slow = True
        self.kill()

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

    def _is_there(self) -> bool:
        """Asked now and then while it says nothing."""
        limit = self._setting.memory_mb
        if limit is not None:
            with suppress(psutil.Error):
                if psutil.Process(self._process.pid).memory_info().rss > limit << 20:
                    self._too_large = True
                    self.kill()
        return self._process.poll() is None
