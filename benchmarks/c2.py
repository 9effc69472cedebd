"""C2: 2,000 idle sessions at one coordinator. The floor is as many bare grpc.aio streams over mTLS."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from benchmarks import light
from benchmarks.exchanges import streams
from benchmarks.light import CONNECTED
from benchmarks.measure import FEDGE, FLOOR, Case, Goal, Options, Sample, Side, Take, memory
from benchmarks.processes import CrashError, settle

_SESSIONS = 2_000
_GOAL_KB = 100.0
_DEADLINE_S = 300.0
_SETTLE_S = 1.0


def cases(options: Options) -> list[Case]:
    sessions = 500 if options.quick else _SESSIONS
    idle_s = 5.0 if options.quick else 20.0

    @contextmanager
    def fedge() -> Iterator[Take]:
        """The sites are enrolled once; coordinator and sessions are new each time, since memory is measured."""
        _allow_descriptors(sessions)
        federation = light.federation("c2", sites=sessions, options=options)
        yield lambda: _hold(federation, idle_s=idle_s)

    def floor() -> Sample:
        _allow_descriptors(sessions)
        found = streams(clients=sessions, idle_s=idle_s, options=options)
        growth = found["rss_connected_bytes"] - found["rss_before_bytes"]
        return _sample(growth, found["connect_seconds"], found["idle_cpu_seconds"], sessions=sessions)

    return [
        Case(
            "C2",
            f"{sessions} idle sessions",
            (Side.of(FLOOR, floor), Side(FEDGE, fedge)),
            (
                Goal(
                    "the coordinator's memory, each",
                    _GOAL_KB,
                    lambda found: found.spread(FEDGE, "session_bytes", per=1e3),
                    "kB",
                ),
            ),
            compares="session_bytes",
        )
    ]


def _hold(federation: light.Federation, *, idle_s: float) -> Sample:
    with federation.coordinator() as server:
        settle(_SETTLE_S)
        before = memory(server.pid, "VmRSS")
        with federation.connected(server, deadline_s=_DEADLINE_S):
            settle(_SETTLE_S)
            cpu = psutil.Process(server.pid).cpu_times()
            settle(idle_s)
            used = psutil.Process(server.pid).cpu_times()
            connect_s = server.lasted_s(CONNECTED)
            growth = memory(server.pid, "VmRSS") - before
            found = federation.sessions()
            if found != federation.sites:
                raise CrashError(f"expected {federation.sites} sites to stay connected, found {found}")
    idle_cpu = used.user + used.system - cpu.user - cpu.system
    return _sample(growth, connect_s, idle_cpu, sessions=found)


def _sample(growth: int, connect_s: float, idle_cpu_s: float, *, sessions: int) -> Sample:
    return Sample(
        {
            "session_bytes": growth / sessions,
            "growth_bytes": float(growth),
            "connect_seconds": connect_s,
            "idle_cpu_seconds": max(0.0, idle_cpu_s),
        }
    )


def _allow_descriptors(sessions: int) -> None:
    """Raise the limit that the processes started from here have.

    Raises:
        CrashError: this machine allows no process as many as it takes.
    """
    wanted = 2 * sessions + 1_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise CrashError(f"expected a hard limit of {wanted} open files (ulimit -Hn), found {hard}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
