"""The demo's processes: started, waited for with a deadline, and ended by their own ids."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.errors import RunError

READY_S = 60.0
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Started:
    """A running `fedge` command and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def fedge_command(*arguments: str) -> list[str]:
    """How this interpreter runs the command line."""
    return [sys.executable, "-c", "from fedge.cli import main; main()", *arguments]


@contextlib.contextmanager
def running(name: str, arguments: Sequence[str], *, log: Path) -> Iterator[Started]:
    """A `fedge` command that is ended, by its own process id, when the block is left."""
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603  # our own interpreter and arguments
            fedge_command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the demo, which then ends these in order
        )
    try:
        yield Started(name, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(started: Started, text: str, *, seconds: float = READY_S) -> None:
    """Wait until a command's output has `text` in it.

    Raises:
        RunError: it ended, or did not say it in time; the end of its output is in the message.
    """
    deadline = time.monotonic() + seconds
    while text.encode() not in started.log.read_bytes():
        if started.process.poll() is not None:
            raise RunError(
                f"{started.name} ended with exit code {started.process.returncode}: {_tail(started)}"
            )
        if time.monotonic() > deadline:
            raise RunError(f"{started.name} did not say {text!r} within {seconds:g} s: {_tail(started)}")
        time.sleep(0.05)


def free_port() -> int:
    """A port on loopback that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(started: Started) -> str:
    return started.log.read_bytes()[-800:].decode(errors="replace").strip()
