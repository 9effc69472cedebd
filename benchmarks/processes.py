"""Processes that benchmarks start: each is ended by its own pid, with its descendants, whatever happens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import PeakOfTree

ROOT = Path(__file__).resolve().parent.parent
END_S = 10.0


class CrashError(RuntimeError):
    """A process ended in a way it should not have; the message ends with what it said last."""


def module(name: str, *arguments: object) -> list[str]:
    """The command line of a Python module, by this interpreter."""
    return [sys.executable, "-m", name, *(str(argument) for argument in arguments)]


@contextmanager
def started(
    arguments: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to `log`, for as long as the context is open."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(env),
            start_new_session=True,  # by which what it leaves behind is found
        )
    try:
        yield process
    finally:
        end(process)


def run_json(
    arguments: Sequence[str], *, log: Path, deadline_s: float, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], int]:
    """Run a process to its end: the JSON object on its last line, and the peak memory of its tree in bytes.

    Raises:
        CrashError: it failed, or took longer than the deadline.
    """
    with started(arguments, log=log, env=env) as process, PeakOfTree(process.pid) as peak:
        finish(process, log=log, deadline_s=deadline_s)
    found = json.loads(last_line(log))
    if not isinstance(found, dict):
        raise CrashError(f"expected a JSON object on the last line of {arguments[:4]}, found {found!r}")
    return found, peak.peak_bytes


def run_text(
    arguments: Sequence[str], *, log: Path, deadline_s: float, env: Mapping[str, str] | None = None
) -> str:
    """Run a command to its end, and return the last line of its output.

    Raises:
        CrashError: it failed, or took longer than the deadline.
    """
    with started(arguments, log=log, env=env) as process:
        finish(process, log=log, deadline_s=deadline_s)
    return last_line(log)


def finish(process: subprocess.Popen[bytes], *, log: Path, deadline_s: float) -> None:
    """Wait for a process that should succeed.

    Raises:
        CrashError: it failed, or took longer than the deadline.
    """
    try:
        code = process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        raise CrashError(f"{_name(process)} took longer than {deadline_s:g} s{tail(log)}") from None
    if code:
        raise CrashError(f"{_name(process)} ended with code {code}{tail(log)}")


def check_running(processes: Mapping[Path, subprocess.Popen[bytes]]) -> None:
    """Raise CrashError if one of the processes, by log, has ended."""
    for log, process in processes.items():
        if process.poll() is not None:
            raise CrashError(f"{_name(process)} ended with code {process.returncode}{tail(log)}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process, then kill what is left of it and of its session, each by its own pid."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(_session(process.pid), timeout=1.0)
    for left in alive:
        with suppress(psutil.NoSuchProcess):
            left.kill()  # psutil compares the time of creation too: a pid used again is not signalled
    psutil.wait_procs(alive, timeout=END_S)


def _session(leader: int) -> list[psutil.Process]:
    """The living processes of the session that `leader` began."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader and process.pid != leader:
                found.append(process)
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listened on just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listens(port: int) -> bool:
    """Whether something accepts connections on the port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """This process's environment, with the repository importable and `extra` on top."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(extra or {})}


def last_line(log: Path) -> str:
    """The last line of output that is not empty."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        raise CrashError(f"expected output in {log.name}, found none")
    return lines[-1].strip()


def tail(log: Path, *, lines: int = 30) -> str:
    """The end of a log, to go behind an error message."""
    found = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n  | " + "\n  | ".join(found) if found else " and said nothing"


def settle(seconds: float) -> None:
    """Let freshly started processes come to rest."""
    time.sleep(seconds)


def _name(process: subprocess.Popen[bytes]) -> str:
    return " ".join(str(part) for part in list(process.args)[:5])  # type: ignore[arg-type]  # a list here
