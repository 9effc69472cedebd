"""The demo's federation: a coordinator and a client per hospital, each a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomlkit
from rich.console import Console

from fedge.checkpoint import to_safetensors
from fedge.config import parse_toml
from fedge.errors import RunError
from fedge.files import write_atomic, write_private
from fedge.run import RunConfig
from fedge.wire import fedge_pb2 as pb
from fedge_client.enrolment import enrol_site
from fedge_client.ledger_report import Place, Report, report
from fedge_client.settings import load_client
from fedge_server.clock import now
from fedge_server.commands.link import CALL_S, admin_link
from fedge_server.commands.run import begin_run, fetch_model, initial_model
from fedge_server.commands.server import init
from fedge_server.commands.watch import watch_run
from fedge_server.state import authority_beside
from fedge_sim.demo.hospitals import HOSPITALS
from fedge_sim.demo.processes import Started, free_port, running, wait_for

RUNS = Path(__file__).parent
POLICY = {
    "tasks": ["fedge_sim.demo.hospitals:task"],
    "units": ["example"],
    "max_epsilon": 8.0,
    "delta": 1e-4,
    "require_secure_aggregation": True,
    "min_cohort": 4,
}
"""What each hospital allows, for ever: no run without privacy, no more than this of them all together, and no sum of
fewer than four."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A run as its coordinator tells it."""

    config: RunConfig
    summary: pb.RunSummary
    rounds: tuple[pb.HistoryRow, ...]
    ledgers: dict[str, Report]
    """Each hospital's, as it stood when the run was over."""

    @property
    def bytes_up(self) -> int:
        return sum(row.bytes_up for row in self.rounds)

    @property
    def bytes_down(self) -> int:
        return sum(row.bytes_down for row in self.rounds)

    @property
    def seconds_per_round(self) -> float:
        """The median; the first rounds also pay for starting up."""
        return sorted(row.seconds for row in self.rounds)[len(self.rounds) // 2]


@dataclass(frozen=True, slots=True)
class Federation:
    """A running federation and the folder that holds its keys and logs."""

    folder: Path
    console: Console

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path, *, console: Console) -> Iterator[Federation]:
        """Start everything, wait until all hospitals are connected; end it all when the block is left.

        Raises:
            RunError: a process ended or was not ready in time.
        """
        address = f"127.0.0.1:{free_port()}"
        coordinator = folder / "coordinator"
        with contextlib.redirect_stdout(None):
            init(coordinator, listen=address, host=None)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(
                running(
                    "the coordinator",
                    ["server", "start", str(coordinator / "server.toml")],
                    log=folder / "coordinator.log",
                )
            )
            wait_for(server, "coordinator ready")
            console.print(f"a coordinator listens on {address}, mutual TLS required")
            _enrol_all(folder, address)
            clients = [stack.enter_context(_client(folder, name)) for name in HOSPITALS]
            for client in clients:
                wait_for(client, "session_started")
            console.print(f"{len(clients)} hospitals are enrolled and connected: {', '.join(HOSPITALS)}")
            yield cls(folder, console)

    def run(self, name: str, *, model: Path) -> Finished:
        """Submit `name`.toml, follow it to its end, and write the model that it made to `model`.

        Raises:
            RunError: the run failed.
        """
        text = (RUNS / f"{name}.toml").read_text(encoding="utf-8")
        config = parse_toml(text, RunConfig, source=f"{name}.toml")
        self.console.print(f"\n{config.strategy.name}: {config.rounds} rounds", style="bold")
        initial = initial_model(config, folder=self.folder)
        with admin_link(self.folder / "coordinator" / "admin.toml") as link:
            run_id = begin_run(link, text, initial)
            summary = watch_run(link, run_id)
            if summary.status != "done":
                raise RunError(f"run {run_id} {summary.status}: {summary.reason}")
            detail = link.Show(pb.RunRef(run_id=run_id), timeout=CALL_S)
            trained = fetch_model(link, run_id)
        model.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(model, to_safetensors(trained, metadata={"fedge_run": run_id}))
        return Finished(config, detail.summary, tuple(detail.history), self._ledgers())

    def _ledgers(self) -> dict[str, Report]:
        """What each hospital's own ledger says, as `fedge client ledger` prints it there."""
        return {
            name: report(Place.of(load_client(self.folder / name / "client.toml"), self.folder / name))
            for name in HOSPITALS
        }


def _enrol_all(folder: Path, address: str) -> None:
    """What each hospital's engineer would do with `fedge client enrol` and an editor."""
    with authority_beside(folder / "coordinator" / "server.toml") as authority:
        tokens = [authority.issue_token(name, now=now()) for name in HOSPITALS]
    for index, (name, token) in enumerate(zip(HOSPITALS, tokens, strict=True)):
        asyncio.run(enrol_site(address, token, ca_pem=authority.ca_pem, folder=folder / name))
        path = folder / name / "client.toml"
        document = tomlkit.parse(path.read_text(encoding="utf-8"))
        document["policy"] = POLICY
        document["worker"] = {"threads": 1}
        document["data"] = {"hospital": index}
        write_private(path, tomlkit.dumps(document))


def _client(folder: Path, name: str) -> contextlib.AbstractContextManager[Started]:
    arguments = ["client", "start", str(folder / name / "client.toml")]
    return running(f"hospital {name}", arguments, log=folder / f"{name}.log")
