"""Which engine a run gets: the one that was asked for, or by a rule the one that is fastest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from fedge.errors import ConfigError
from fedge.parallel import processors
from fedge.run import RunConfig
from fedge.strategy import WorkKind
from fedge.task import OwnTask, Task
from fedge_sim.clients import Clients
from fedge_sim.engines.accelerator import accelerator
from fedge_sim.engines.ahead import Ahead, Makers
from fedge_sim.engines.crew import Crew, UnsuitedError
from fedge_sim.engines.processes import Processes
from fedge_sim.engines.stacks import Stacks
from fedge_sim.own import OwnClients
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts
from fedge_sim.variates import Own

EngineName = Literal["auto", "loop", "vectorised", "processes", "ray"]
ENGINES: Final[tuple[EngineName, ...]] = ("auto", "loop", "vectorised", "processes", "ray")

_STACKS_BELOW: Final = 1 << 16
"""Parameters of a model from which on a stack is no faster than the loop, which has one model in the cache."""

_STACKS_FROM: Final = 4096
"""Turns of clients in a run that win back the second or so that it takes to trace a step."""

_PRIVATE_STACKS_FROM: Final = 512
"""As that, where each turn computes the gradient of each example."""

_PROCESSES_FROM: Final = 1_000_000_000
"""Parameters times turns that win back the seconds that it takes to start workers."""

_TURN: Final = 100_000
"""Parameters whose training costs as much as a turn does without any."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a task is from: `folder` is searched before the usual import path; `own` was made in this process, and has
    no name that another could import it by."""

    folder: Path | None = None
    own: Task | OwnTask | None = None

    @classmethod
    def of(cls, given: Task | OwnTask | None, *, name: str, folder: Path | None) -> Origin:
        """Of a task that `simulate` was given, or else imported by its name."""
        module, _, attribute = name.partition(":")
        if given is None or getattr(sys.modules.get(module), attribute, None) is given:
            return cls(folder)
        return cls(folder, given)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody has asked for: an engine, its processes, an accelerator to train on."""

    engine: EngineName = "auto"
    workers: int | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, engine: EngineName, workers: int | None, device: str) -> Wanted:
        """
        Raises:
            ConfigError: there is no such engine or device, the engine uses none, or its workers are none.
        """
        if engine not in ENGINES:
            raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, found {str(engine)[:80]!r}")
        if workers is not None and not 1 <= workers <= 1024:
            raise ConfigError(f"workers: expected 1 to 1024 processes, found {workers}")
        found = accelerator(device)
        if found is not None and engine not in ("auto", "vectorised"):
            raise ConfigError(
                f"device {device}: expected the engine auto or vectorised, which can use it, found {engine}"
            )
        return cls(engine, workers, found)


def employed(
    wanted: Wanted,
    run: RunConfig,
    task: Task | OwnTask,
    population: Population,
    accounts: Accounts,
    own: Own,
    *,
    kind: WorkKind,
    size: int,
    origin: Origin,
) -> tuple[Clients | OwnClients, Ahead]:
    """The clients of a run, and who works for several of them at once.

    Raises:
        ConfigError: the engine that is insisted on does not suit the run, or the task.
    """
    if isinstance(task, OwnTask):
        if wanted.engine not in ("auto", "loop") or wanted.device is not None:
            raise ConfigError(
                f"engine {wanted.engine}: expected loop on this machine's processors for a task that trains by itself"
            )
        if own.size:
            raise ConfigError(
                f"strategy {run.strategy.name}: expected a task whose gradients control variates can correct, "
                "found one that trains by itself"
            )
        return OwnClients(run, task, population.names, accounts), Ahead((), insists=False)
    clients = Clients(run, task, population, accounts, own)
    return clients, chosen(wanted, run, task, clients, kind=kind, size=size, origin=origin)


def chosen(
    wanted: Wanted,
    run: RunConfig,
    task: Task,
    clients: Clients,
    *,
    kind: WorkKind,
    size: int,
    origin: Origin,
) -> Ahead:
    """The crew that works for the clients of a run whose orders are of this kind, with a model of `size` parameters.

    By rules and not by a measurement, which would have the same seed give other bits on a busier machine. Who has
    asked for an accelerator gets a stack on it.
    """
    engine, workers = wanted.engine, wanted.workers
    if wanted.device is not None:
        engine = "vectorised"
    rule = engine == "auto"
    turns = run.rounds * run.cohort.size
    count = min(workers or processors(), run.simulation.clients)

    def stacks() -> Crew:
        if rule and turns < (_PRIVATE_STACKS_FROM if run.privacy.unit == "example" else _STACKS_FROM):
            raise UnsuitedError(f"a run of {turns} turns of clients is over before a stack is faster")
        crew = Stacks(run, task, clients, device=wanted.device)
        if rule and size >= _STACKS_BELOW:
            raise UnsuitedError(f"a model of {size} parameters is no faster in a stack")
        return crew

    def processes() -> Crew:
        if rule:
            if count < 2:
                raise UnsuitedError("there is one processor")
            if origin.own is not None:
                raise UnsuitedError("the task has no name by which another process could import it")
            if turns * (size + _TURN) < _PROCESSES_FROM:
                raise UnsuitedError(f"a run of {turns} turns of clients is over before workers have started")
        own = task if origin.own is not None else None
        return Processes(
            run,
            kind=kind,
            size=size,
            workers=count,
            vectors=clients.own,
            folder=origin.folder,
            own=own,
        )

    def on_ray() -> Crew:
        if origin.own is not None:
            raise ConfigError(
                "engine ray: the task was given as an object, which other machines cannot import: put it in a module "
                "and give its name (run.task)"
            )
        try:
            from fedge_sim.engines.on_ray import OnRay
        except ModuleNotFoundError as error:
            raise ConfigError(f"engine ray: it needs {error.name}: pip install 'fedge[ray]'") from error
        return OnRay(
            run,
            task,
            clients,
            kind=kind,
            size=size,
            stacked=size < _STACKS_BELOW,
            workers=workers,
            folder=origin.folder,
        )

    makers: Makers = (("vectorised", stacks), ("processes", processes))
    if engine == "ray":
        makers = (("ray", on_ray),)
    return Ahead([each for each in makers if engine in ("auto", each[0])], insists=not rule)
