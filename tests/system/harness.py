"""What the system tests share: `fedge` processes, a federation of them, and waits that have deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import big
import leaky
import psutil
import tiny
import tomlkit
import wide

from fedge import faults
from fedge.config import parse_toml
from fedge.files import write_private
from fedge.run import RunConfig
from fedge.task import first_model
from fedge.vector import Array, Model, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge_client.enrolment import enrol_site
from fedge_client.identity import Identity
from fedge_server.clock import now
from fedge_server.commands.link import admin_link
from fedge_server.commands.run import begin_run, fetch_model
from fedge_server.identity import Authority
from fedge_server.state import authority_beside
from fedge_sim import simulate

PATIENCE_S = 100.0
_END_S = 20.0
_FEDGE = str(Path(sys.executable).with_name("fedge"))
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
_TASKS = {"tiny:task": tiny.task, "wide:task": wide.task, "big:task": big.task, "leaky:task": leaky.task}
_TASK_FILES = tuple(Path(each.__file__) for each in (tiny, wide, big, leaky))


def until(condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE_S) -> Any:
    """The first true value of `condition`, asked every now and then until a deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.01)
    return value


def fedge(
    *arguments: str | Path, cwd: Path | None = None, seconds: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run a `fedge` command to its end."""
    return subprocess.run(
        [_FEDGE, *map(str, arguments)],
        cwd=cwd,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def fedge_ok(*arguments: str | Path, cwd: Path | None = None) -> str:
    """The standard output of a `fedge` command that must succeed."""
    done = fedge(*arguments, cwd=cwd)
    assert done.returncode == 0, f"fedge {arguments} exited with {done.returncode}: {done.stderr}"
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Running:
    """A `fedge` command that runs, and the file that its output goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls,
        *arguments: str | Path,
        log: Path,
        cwd: Path | None = None,
        fault: str = "",
        on: Sequence[str] = (),
    ) -> Running:
        """`on` is what goes in front of the command, for it to run on another host."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*on, _FEDGE, *map(str, arguments)],
                cwd=cwd,
                env=_ENVIRONMENT | ({faults.VARIABLE: fault} if fault else {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def says(self, text: str, *, times: int = 1) -> None:
        """Wait until the output has `text` in it, so many times."""

        def said() -> bool:
            if self.output.count(text) >= times:
                return True
            code = self.process.poll()
            if code is not None and self.output.count(text) < times:
                raise AssertionError(f"{self.log.name} exited with {code}: {self.output[-2000:]}")
            return False

        until(said, f"{self.log.name} says {text!r}; it said: {self.output[-2000:]}")

    def ends(self) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(PATIENCE_S)

    def signal(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end; the exit code, negative if the signal itself ended it."""
        self.process.send_signal(number)
        return self.ends()

    def workers(self) -> list[psutil.Process]:
        """Its worker processes: normally one."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if _is_worker(child)]

    def end(self) -> None:
        """End it and whatever it started, each by its own id; harmless when it has ended."""
        children = [*self.workers()]
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return "fedge_client.worker" in process.cmdline()
    return False


@dataclass(frozen=True)
class Federation:
    """A coordinator in `folder`/coordinator, its admin's link, and the sites that were enrolled."""

    folder: Path
    address: str
    server: Running
    admin: services.AdminStub
    authority: Authority
    """Beside the coordinator's own, as `fedge server token` has it."""
    clients: dict[str, Running] = field(default_factory=dict)
    servers: list[Running] = field(default_factory=list)
    """Every coordinator process there was, the present one last."""

    @property
    def home(self) -> Path:
        return self.folder / "coordinator"

    @property
    def admin_toml(self) -> Path:
        return self.home / "admin.toml"

    def control(self, name: str) -> Path:
        """Where a site's tiny task looks for what to do wrong."""
        return self.folder / name / "control"

    @contextlib.contextmanager
    def blocked(self, name: str) -> Iterator[None]:
        """Within the block a site's training does not end once it has begun; entered before it has."""
        control = self.control(name)
        (control / "reached").unlink(missing_ok=True)
        (control / "block").touch()
        try:
            yield
        finally:
            (control / "block").unlink()

    def at_work(self, name: str) -> None:
        """Wait until a blocked site is in the middle of its training."""
        until((self.control(name) / "reached").exists, f"{name} is at work")

    def enrol(self, name: str, **tables: dict[str, Any]) -> Identity:
        """Let a site in, with the tasks in its folder and `tables` in its client.toml."""
        folder, ca_pem = self.folder / name, self.authority.ca_pem
        token = self.authority.issue_token(name, now=now())
        identity = asyncio.run(enrol_site(self.address, token, ca_pem=ca_pem, folder=folder))
        self.control(name).mkdir(exist_ok=True)
        tasks_into(folder)
        defaults = {"worker": {"threads": 1}, "data": {"control": str(self.control(name))}}
        set_tables(folder / "client.toml", defaults | tables)
        return identity

    def start(self, name: str, *, fault: str = "", on: Sequence[str] = ()) -> Running:
        """Start an enrolled site's client and wait until it is connected."""
        client = Running.start(
            "client",
            "start",
            self.folder / name / "client.toml",
            log=self.folder / f"{name}.log",
            fault=fault,
            on=on,
        )
        self.clients[name] = client
        until(lambda: name in self.connected() or client.process.poll() is not None, f"{name} is connected")
        assert client.process.poll() is None, client.output
        return client

    def restarted(self, *, fault: str = "", ready: bool = True) -> Federation:
        """The same federation with a new coordinator process, once that is ready."""
        server = Running.start("server", "start", self.home / "server.toml", log=self.server.log, fault=fault)
        if ready:
            server.says("coordinator ready", times=self.server.output.count("coordinator ready") + 1)
        self.servers.append(server)
        return replace(self, server=server)

    def connected(self) -> set[str]:
        return {site.name for site in self.admin.Sites(pb.SitesRequest()).sites if site.connected}

    def submit(self, text: str) -> str:
        """Begin a run; its id."""
        return begin_run(self.admin, text, initial_model(text))

    @contextlib.contextmanager
    def submitted(self, text: str) -> Iterator[str]:
        """A run that is stopped when the block is left, if it is not over by then; its id."""
        run_id = self.submit(text)
        try:
            yield run_id
        finally:
            self.admin.Stop(pb.RunRef(run_id=run_id))
            self.finish(run_id)

    def finish(self, run_id: str) -> pb.RunSummary:
        """Follow a run until it is over."""
        summary = pb.RunSummary()
        for event in self.admin.Watch(pb.RunRef(run_id=run_id), timeout=PATIENCE_S):
            summary = event.summary
        return summary

    def run(self, text: str) -> pb.RunDetail:
        """Submit a run that must succeed, and see it through."""
        run_id = self.submit(text)
        summary = self.finish(run_id)
        assert summary.status == "done", summary.reason
        return self.show(run_id)

    def ready(self, run_id: str) -> set[str]:
        """The sites that have joined a run."""
        return {client.name for client in self.show(run_id).clients if client.state in ("ready", "working")}

    def show(self, run_id: str) -> pb.RunDetail:
        return self.admin.Show(pb.RunRef(run_id=run_id))

    def show_json(self, run_id: str) -> dict[str, Any]:
        """What `fedge run show --json` prints."""
        out = fedge_ok("run", "show", run_id, "--json", "--admin", self.admin_toml)
        return dict(json.loads(out))

    def model(self, run_id: str) -> Array:
        """The vector of a run's last committed round."""
        return fetch_model(self.admin, run_id).vector

    def digest(self, run_id: str) -> str:
        """The digest of a run's model, as `fedge simulate` reports it."""
        return hashlib.sha256(bytes_of(self.model(run_id))).hexdigest()


@contextlib.contextmanager
def coordinator(folder: Path, *, database: str = "", **settings: Any) -> Iterator[Federation]:
    """A new federation whose coordinator runs; every process started in it is ended with it.

    `settings` are further keys of its server.toml.
    """
    address = f"127.0.0.1:{free_port()}"
    home = folder / "coordinator"
    fedge_ok("server", "init", home, "--listen", address, *(["--database", database] if database else []))
    set_tables(home / "server.toml", settings)
    server = Running.start("server", "start", home / "server.toml", log=folder / "coordinator.log")
    started: Federation | None = None
    try:
        server.says("coordinator ready")
        with admin_link(home / "admin.toml") as admin, authority_beside(home / "server.toml") as authority:
            started = Federation(folder, address, server, admin, authority)
            yield started
    finally:
        for running in [*started.clients.values(), *started.servers] if started else []:
            running.end()
        server.end()
    for running in [*started.servers, server]:  # sites show the tracebacks of their task's code
        assert "Traceback" not in running.output, running.output


def run_toml(
    name: str, *, task: str = "tiny:task", rounds: int = 3, quorum: int = 2, size: int = 2, more: str = ""
) -> str:
    """A run of one of the tasks here; `more` is TOML that follows."""
    learning_rate = {"tiny:task": 0.05, "wide:task": 1e-4, "big:task": 1e-6}.get(task, 0.05)  # none diverges
    return f"""\
name = "{name}"
task = "{task}"
rounds = {rounds}
seed = 7

[work]
batch_size = 4
learning_rate = {learning_rate:.7f}

[cohort]
size = {size}
quorum = {quorum}
deadline_s = 60
wait_s = 60

{more}
"""


def tasks_into(folder: Path) -> None:
    """What the engineer of a site, or of a run, installs there."""
    for path in _TASK_FILES:
        shutil.copy(path, folder)


def initial_model(text: str) -> Model:
    """The seeded model with which a run begins; a task of another name has the tiny one's."""
    config = parse_toml(text, RunConfig, source="run.toml")
    task = _TASKS.get(config.task, tiny.task)
    return first_model(task, seed=config.seed, personal=config.work.personal)


def simulated(text: str, *, clients: int = 2) -> str:
    """The digest of the model that the same run makes in a simulation."""
    config = parse_toml(text, RunConfig, source="run.toml")
    result = simulate(config, task=_TASKS.get(config.task, tiny.task), clients=clients, engine="loop")
    assert result.status == "done", result.reason
    return hashlib.sha256(bytes_of(result.model.vector)).hexdigest()


def set_tables(path: Path, tables: dict[str, Any]) -> None:
    """Write tables into a TOML file that exists."""
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    for key, value in tables.items():
        document[key] = value
    write_private(path, tomlkit.dumps(document))
