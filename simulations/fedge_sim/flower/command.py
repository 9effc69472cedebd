"""`fedge flower`: what somebody types who has a Flower app."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedge.errors import ConfigError
from fedge_sim.apart import output_apart

if TYPE_CHECKING:  # which is not installed everywhere
    from fedge_flower.app import FlowerApp, Settings

app = typer.Typer(help="Flower apps, unchanged.", no_args_is_help=True)


@app.callback()
def flower() -> None:
    """Flower apps, unchanged."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="With the app's pyproject.toml.")],
    admin: Annotated[
        Path | None,
        typer.Option(
            metavar="ADMIN.toml",
            help="Run it on this coordinator's sites; on this machine alone unless given.",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            help="Nodes; as the app's pyproject.toml has it, or 10, unless given. "
            "On a coordinator, how many have to be there before it begins: 1 unless given."
        ),
    ] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Settings instead of the app's own, or a TOML file; may be repeated."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes for its ClientApp; as many as there are processors unless given."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="What global random generators begin from: 0 unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Run a Flower app: its ServerApp here, its ClientApp in warm processes, here or at a coordinator's sites.

    Examples: fedge flower run quickstart-pytorch --nodes 20 --run-config "num-server-rounds=5"

    fedge flower run quickstart-pytorch --admin coordinator/admin.toml --nodes 3
    """
    from fedge_flower.app import FlowerApp, parse_settings

    found = FlowerApp.load(folder)
    config = found.with_config(parse_settings(run_config or []))
    if admin is None:
        told = _simulated(found, config, nodes, workers, seed or 0)
    else:
        if workers is not None or seed is not None:
            raise ConfigError(
                "--workers and --seed are of simulations: on a coordinator each site has its own processes "
                "([flower] processes in its client.toml), and nothing is seeded; leave them out, or leave out --admin"
            )
        told = _submitted(found, config, admin, 1 if nodes is None else nodes)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo(
            f"{found.name} is done: {told['nodes']} nodes, {told['messages']} messages, {told['replies']} replies"
        )


def _simulated(
    found: FlowerApp, config: Settings, nodes: int | None, workers: int | None, seed: int
) -> dict[str, Any]:
    from fedge_sim.flower.simulation import simulate_app

    count = found.nodes if nodes is None else nodes
    with output_apart():
        done = simulate_app(found, config=config, nodes=count, workers=workers, seed=seed)
    return {"app": found.name, **asdict(done)}


def _submitted(found: FlowerApp, config: Settings, admin: Path, nodes: int) -> dict[str, Any]:
    from fedge_server.flower.submission import submit_app

    if not 1 <= nodes <= 1_000_000:
        raise ConfigError(f"--nodes: expected 1 to 1000000 nodes to wait for, found {nodes}")
    with output_apart():
        done = submit_app(
            found, admin=admin, config=config, nodes=nodes, say=lambda text: typer.echo(text, err=True)
        )
    return {"app": found.name, **asdict(done)}
