"""`fedge simulate`: what a researcher types."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TimeRemainingColumn

from fedge.cli import INTERRUPTED
from fedge.console import live_progress, plain_console
from fedge.errors import ConfigError, RunError
from fedge.history import Row
from fedge.run import RunConfig
from fedge_sim.apart import output_apart
from fedge_sim.told import Told

Callback = Callable[[Row], None]


def simulate(
    path: Annotated[
        Path | None, typer.Argument(metavar="[RUN.toml]", show_default=False, help="Needed but to compare.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Clients, instead of simulation.clients.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the file's.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="auto, loop, vectorised (a cohort as one stacked tensor, where the model allows it), processes or ray."
        ),
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes that train; as many as there are processors unless given.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Where a stacked tensor lies and is trained: cpu, or an accelerator such as cuda or cuda:1."
        ),
    ] = "cpu",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Results folder; results/NAME-TIME unless given.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Lay earlier results beside these in the report; may be repeated."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=[...]", help="Simulate with each of these values; if repeated, all combinations."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Simulate a run on this machine: the deployed rounds, strategies and trainers, no network.

    Example: fedge simulate run.toml --clients 50 --rounds 20 --out results/first
    """
    beside = compare or []
    if path is None:
        if len(beside) < 2:
            raise ConfigError("expected a RUN.toml to simulate, or --compare twice or more, found neither")
        page = (out or Path("results")) / "report.html"
        _write_page(page, beside, plain_console(stderr=True), needed=True)
        typer.echo(f"report in {page}")
        return
    if beside:  # before hours of work depend on it
        _page()
        for each in beside:
            Told.of(each, label="")
    # torch takes seconds to import: mistakes in the file or the flags are reported before it.
    config = RunConfig.load(path)
    if grid:
        given = {"--clients": clients, "--rounds": rounds, "--seed": seed, "--compare": compare or None}
        how = {"engine": engine, "processes": workers, "device": device}
        _sweep(path, grid, given, out=out, name=config.name, how=how, as_json=as_json)
        return
    folder = out or Path("results") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  # local, for people
    from fedge_sim.engine import simulate as run_simulation
    from fedge_sim.folders import prepare_folder
    from fedge_sim.report import write_results

    prepare_folder(folder)
    console = plain_console(stderr=True)
    for note in config.notes():
        console.print(f"note: {note}")
    with (
        output_apart(),
        _progress(console, config.name, rounds or config.rounds, quiet=as_json) as show,
    ):
        result = run_simulation(
            path,
            clients=clients,
            rounds=rounds,
            seed=seed,
            engine=engine,  # type: ignore[arg-type]  # it is checked there, with torch
            workers=workers,
            device=device,
            callbacks=() if as_json else (show,),
        )
    write_results(folder, result)
    if as_json:
        typer.echo(json.dumps(result.summary() | {"out": str(folder)}))
    else:
        found = _found(f"{len(result.history)} rounds, {result.clients} clients", result.metrics)
        console.print(f"{result.status}: {found}")
        injected = "  ".join(f"{name} {count}" for name, count in result.faults.counts.items() if count)
        if injected:
            console.print(f"faults: {injected}")
        if result.moments:
            last = result.moments[-1]
            console.print(
                f"virtual time: {last.virtual_s / 3600:.3g} hours  energy {last.joules / 1000:.3g} kJ  "
                f"wasted orders {last.wasted}",
            )
        console.print(f"engine: {result.engine}")
        if spent := str(result.privacy):
            console.print(spent)
        typer.echo(f"results in {folder}")
    _write_page(folder / "report.html", [folder, *beside], console, needed=bool(beside))
    if result.status == "stopped":
        raise typer.Exit(INTERRUPTED)
    if result.status != "done":
        raise RunError(f"run {config.name} {result.status} at round {len(result.history)}: {result.reason}")


def _sweep(
    path: Path,
    grid: list[str],
    given: Mapping[str, object],
    *,
    out: Path | None,
    name: str,
    how: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Each combination of the grid's values, and a table of what comes of them."""
    if odd := [flag for flag, value in given.items() if value is not None]:
        raise ConfigError(
            f"--grid: expected it without {', '.join(odd)}: put 'rounds=[10]' and the like into the grid"
        )
    from fedge_sim.sweep import Swept, parse_grid, sweep

    folder = out or Path("results") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  # local, for people
    console = plain_console(stderr=True)

    def told(done: Swept) -> None:
        if not as_json:
            shown = (
                (key, f"{value:.4g}" if isinstance(value, float) else value)
                for key, value in done.row().items()
            )
            words = "  ".join(f"{key} {value}" for key, value in shown if value != "")
            console.print(words)

    swept = sweep(path, parse_grid(grid), out=folder, told=told, **how)
    if as_json:
        typer.echo(json.dumps([each.row() | {"out": str(each.folder)} for each in swept]))
    else:
        typer.echo(f"results in {folder}")
    finished = [each.folder for each in swept if not each.error]
    if finished:
        _write_page(folder / "report.html", finished, console, needed=False)
    failed = [each for each in swept if each.row()["status"] != "done"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(swept)} runs have not come to their end; see {folder / 'sweep.csv'}"
        )


def _write_page(path: Path, folders: list[Path], console: Console, *, needed: bool) -> None:
    """A report that cannot be made is a note, unless somebody has asked for it: the results are there."""
    try:
        _page().write_page(path, folders)
    except ConfigError as error:
        if needed:
            raise
        console.print(f"note: {error}")


def _page() -> ModuleType:
    """The module that makes reports.

    Raises:
        ConfigError: what it needs is not installed.
    """
    try:
        from fedge_sim import page
    except ImportError as error:
        raise ConfigError(f"no report: it needs {error.name}; pip install 'fedge[report]'") from None
    return page


@contextmanager
def _progress(console: Console, name: str, rounds: int, *, quiet: bool) -> Iterator[Callback]:
    """A bar where a person looks on; a line per round elsewhere."""
    live = console.is_terminal and not quiet
    with live_progress(console, TimeRemainingColumn(), live=live) as progress:
        bar = progress.add_task(name, total=rounds, note="")
        shown: set[int] = set()

        def show(row: Row) -> None:
            progress.update(bar, completed=row.round, note=_line(row))
            if not live and not quiet:
                again = "evaluated  " if row.round in shown else ""
                console.print(f"round {row.round}/{rounds}  {again}{_line(row)}")
                shown.add(row.round)

        yield show


def _line(row: Row) -> str:
    return _found(f"{len(row.clients)} clients", row.metrics)


def _found(what: str, metrics: Mapping[str, float]) -> str:
    return "  ".join([what, *(f"{name} {value:.4f}" for name, value in metrics.items())])
