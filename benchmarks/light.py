"""A real coordinator process and many light sites (tasks/light.py), for C1 to C4.

The coordinator is `fedge server start`; sites are enrolled in this process, by the authority beside it, since
their enrolment is not what is measured. They share one key, and each has a certificate of its own. What
becomes of a run is read off the coordinator's log, which costs the coordinator nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path

import numpy as np
import tomlkit

from benchmarks.fedge_side import FEDGE
from benchmarks.measure import Options, wait_until
from benchmarks.processes import CrashError, check_running, free_port, module, run_text, started, tail
from fedge.principal import Token
from fedge.signing import make_signing_key, prove, public_bytes, signing_key_of_pem
from fedge.vector import Layout, Model, Tensor
from fedge.wire import fedge_pb2 as pb
from fedge_client.identity import make_csr
from fedge_server.clock import now
from fedge_server.commands.link import admin_link
from fedge_server.commands.run import begin_run
from fedge_server.state import authority_beside

READY, CONNECTED = "coordinator ready", "site_connected"
RESUMED, COMMITTED, GIVEN_UP, ENDED = "run_resumed", "round_committed", "round_given_up", "run_ended"
_COMMAND_S = 60.0
_POLL_S = 0.01
_MOMENT = len("2026-01-31 12:00:00,000")


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A coordinator process, and the log that is its own."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float
    """`time.monotonic()` just before it was started."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def lines(self, event: str) -> list[str]:
        """What it has logged of an event so far: lines of it, and not those that mention it."""
        begins = re.compile(
            rf"(\S+ \S+ [A-Z]+ )?{event}\b"
        )  # behind the time and the level, if it is a log's
        return [line for line in self.log.read_text(errors="replace").splitlines() if begins.match(line)]

    def lasted_s(self, event: str) -> float:
        """Seconds from the first time that it logged an event to the last."""
        first, *_, last = (datetime.fromisoformat(line[:_MOMENT]) for line in self.lines(event))
        return (last - first).total_seconds()

    def last_round(self, event: str) -> int:
        """The round that the last line of an event names."""
        found = re.search(r"\bround=(\d+)", self.lines(event)[-1])
        if found is None:
            raise CrashError(f"expected a round in the lines of {event}{tail(self.log)}")
        return int(found[1])

    def until(self, event: str, *, times: int = 1, deadline_s: float) -> float:
        """Wait until an event was logged so often; the seconds since the process was started.

        Raises:
            CrashError: the process has ended, or a run of it.
        """

        def happened() -> bool:
            if len(self.lines(event)) >= times:
                return True
            check_running({self.log: self.process})
            if event != ENDED and self.lines(ENDED):
                raise CrashError(f"expected {event} {times} times before the run ended{tail(self.log)}")
            return False

        what = f"{event} {times} times in {self.log.name}"
        wait_until(happened, deadline_s=deadline_s, every_s=_POLL_S, what=what)
        return time.monotonic() - self.began


@dataclass(frozen=True, slots=True)
class Federation:
    """An initialised coordinator's folder and the identities of its sites; no process yet."""

    folder: Path
    address: str
    sites: int
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def home(self) -> Path:
        return self.folder / "server"

    @contextmanager
    def coordinator(self, *, ready: bool = True) -> Iterator[Coordinator]:
        """A coordinator process for as long as the context is open."""
        log = self.folder / f"server-{next(self._numbers)}.log"
        began = time.monotonic()
        with started([FEDGE, "server", "start", str(self.home / "server.toml")], log=log) as process:
            running = Coordinator(process, log, began)
            if ready:
                running.until(READY, deadline_s=_COMMAND_S)
            yield running

    @contextmanager
    def connected(
        self, server: Coordinator, *options: object, processes: int = 2, deadline_s: float = 120.0
    ) -> Iterator[Mapping[Path, subprocess.Popen[bytes]]]:
        """All sites, connected to `server`, in so many processes; `options` are tasks/light.py's."""
        logs: dict[Path, subprocess.Popen[bytes]] = {}
        with ExitStack() as stack:
            for number in range(processes):
                first, end = (self.sites * place // processes for place in (number, number + 1))
                part = ("--first", first, "--count", end - first)
                program = "benchmarks.tasks.light"
                arguments = module(program, self.folder / "identities.json", self.address, *part, *options)
                log = self.folder / f"sites-{next(self._numbers)}.log"
                logs[log] = stack.enter_context(started(arguments, log=log))
            server.until(CONNECTED, times=self.sites, deadline_s=deadline_s)
            yield logs

    def submit(self, run: str, *, elements: int) -> str:
        """Begin a run with a model of so many zeros; its id."""
        layout = Layout((Tensor("w", (elements,)),))
        with admin_link(self.home / "admin.toml") as admin:
            return begin_run(admin, run, Model(np.zeros(elements, np.float32), layout))

    def show(self, run_id: str) -> pb.RunDetail:
        """What the coordinator says about a run."""
        with admin_link(self.home / "admin.toml") as admin:
            return admin.Show(pb.RunRef(run_id=run_id), timeout=_COMMAND_S)

    def sessions(self) -> int:
        """How many sites are connected, by the coordinator's own count."""
        with admin_link(self.home / "admin.toml") as admin:
            return sum(site.connected for site in admin.Sites(pb.SitesRequest(), timeout=_COMMAND_S).sites)


def federation(name: str, *, sites: int, options: Options) -> Federation:
    """A new coordinator's folder, with so many sites enrolled."""
    folder = Path(options.scratch) / f"{name}-{time.monotonic_ns()}"
    folder.mkdir()
    made = Federation(folder, f"127.0.0.1:{free_port()}", sites)
    arguments = [FEDGE, "server", "init", str(made.home), "--listen", made.address]
    run_text(arguments, log=folder / "init.log", deadline_s=_COMMAND_S)
    key_pem, csr = make_csr()
    with authority_beside(made.home / "server.toml") as authority:
        certificates = {}
        for number in range(sites):
            token = Token.decode(authority.issue_token(f"site-{number:05}", now=now()))
            site, key = token.principal, signing_key_of_pem(make_signing_key())
            proof = prove(key, federation=site.federation, site=site.name, csr_der=csr)
            certificate = authority.enrol(site, csr, key=public_bytes(key), proof=proof, now=now())
            certificates[site.name] = certificate.decode()
        known = {"ca": authority.ca_pem.decode(), "key": key_pem.decode(), "certificates": certificates}
    path = folder / "identities.json"
    path.write_text(json.dumps(known))
    path.chmod(0o600)
    return made


def run_toml(name: str, *, rounds: int, size: int, over_select: float = 1.0) -> str:
    """A run whose every round needs `size` updates."""
    return tomlkit.dumps(
        {
            "name": name,
            "task": "light:task",
            "rounds": rounds,
            "seed": 7,
            "cohort": {"size": size, "over_select": over_select, "deadline_s": 120, "wait_s": 120},
            "evaluation": {"every": 0},
            "privacy": {"unit": "none"},
        }
    )


def count_lines(logs: Mapping[Path, subprocess.Popen[bytes]], word: str) -> int:
    """How many lines of the sites' logs begin with a word, while all of their processes run.

    Raises:
        CrashError: one has ended, or a site has failed.
    """
    check_running(logs)
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    failed = [line for line in lines if line.startswith("failed")]
    if failed:
        raise CrashError(f"expected no site to fail, found {len(failed)}: {failed[0]}")
    return sum(line.startswith(word) for line in lines)
