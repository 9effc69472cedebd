"""`simulate`: a run on this machine, from its configuration to its result."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from fedge.errors import ConfigError
from fedge.run import RunConfig
from fedge.task import OwnTask, Task, load_any_task
from fedge_client.torch.threads import using_threads
from fedge_sim.driver import Driver
from fedge_sim.engines.accelerator import reproducible
from fedge_sim.engines.chosen import EngineName, Origin, Wanted
from fedge_sim.memory import keep_freed
from fedge_sim.record import Callback
from fedge_sim.result import Result

log = logging.getLogger(__name__)


def simulate(
    run: RunConfig | Path | str,
    *,
    task: Task | OwnTask | None = None,
    clients: int | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    engine: EngineName = "auto",
    workers: int | None = None,
    device: str = "cpu",
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Run a federation on this machine. The same run and seed give the same bits.

    `run` is a RunConfig or the path of a run.toml, from whose folder the task is then imported; `task`
    takes the place of the task it names (the loop alone works for one that trains by itself), and `clients`, `rounds`
    and `seed` of its own numbers. The engine
    "vectorised" trains a cohort as one stacked tensor where the model allows it (`fedge_sim.engines.cohort`), to the
    same numbers but for float32's rounding; "processes" has `workers` processes of one thread train (as many as there
    are processors unless given), whose number changes no bit; "loop" is one client after the other, to the bits of a
    deployment; "auto" is the first of these that suits the run and is worth its start. On a `device` ("cuda", "cuda:1")
    the stacked tensor lies, is trained and is aggregated there; what cannot be stacked is done here.
    KeyboardInterrupt ends the run at its last committed round, with the status "stopped"; so does an error later than
    the first one, with "failed" and its reason.

    Raises:
        ConfigError: the run, or a combination of its settings, is wrong, or there is no such engine or device.
        TaskError: the task's code fails on a client, before a round was committed.
    """
    folder = None
    if not isinstance(run, RunConfig):
        folder = Path(run).parent.resolve()
        run = RunConfig.load(Path(run))
    numbers = {"clients": clients, "rounds": rounds, "seed": seed}
    return simulate_in(
        folder,
        run,
        task=task,
        numbers=numbers,
        engine=engine,
        workers=workers,
        device=device,
        callbacks=callbacks,
    )


def simulate_in(
    folder: Path | None,
    run: RunConfig,
    *,
    task: Task | OwnTask | None = None,
    numbers: Mapping[str, int | None] = MappingProxyType({}),
    engine: EngineName = "auto",
    workers: int | None = None,
    device: str = "cpu",
    callbacks: Iterable[Callback] = (),
) -> Result:
    """`simulate` for a run whose file, and what that names, lies in `folder`."""
    wanted = Wanted.of(engine, workers, device)
    run = _with(run, **numbers)
    origin = Origin.of(task, name=run.task, folder=folder)
    if task is None:
        task = load_any_task(run.task, path=folder)
    if left_out := run.left_out(task.metrics):
        log.warning("metrics_left_out %s", left_out)
    keep_freed()
    driver = Driver(run, task, tuple(callbacks), wanted, origin)
    with using_threads(driver.threads), reproducible(wanted.device), driver:
        try:
            driver.run()
        except KeyboardInterrupt:
            driver.stop()
    return driver.result()


def _with(
    run: RunConfig, *, clients: int | None = None, rounds: int | None = None, seed: int | None = None
) -> RunConfig:
    """The run with these numbers in place of its own, checked like its own."""
    table = run.model_dump(exclude_unset=True)
    table |= {key: value for key, value in (("rounds", rounds), ("seed", seed)) if value is not None}
    if clients is not None:
        table["simulation"] = {**table.get("simulation", {}), "clients": clients}
    changed = RunConfig.from_table(table, source=f"run {run.name!r}")
    count, needed = changed.simulation.clients, changed.cohort.needed
    if count < needed:
        raise ConfigError(
            f"simulation.clients: expected at least the {needed} clients that a round needs "
            f"(cohort.quorum, or cohort.size without one), found {count}"
        )
    stated = changed.strategy.fields.get("clients") if changed.strategy.name == "scaffold" else None
    if stated is not None and stated != count:
        raise ConfigError(f"strategy.clients: expected the {count} clients of the simulation, found {stated}")
    return changed
