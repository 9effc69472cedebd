"""`fedge flower`: what somebody types who has a Flower app."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedge_sim.apart import output_apart

app = typer.Typer(help="Flower apps, unchanged.", no_args_is_help=True)


@app.callback()
def flower() -> None:
    """Flower apps, unchanged."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="With the app's pyproject.toml.")],
    nodes: Annotated[
        int | None, typer.Option(help="Nodes; as the app's pyproject.toml has it, or 10, unless given.")
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
    seed: Annotated[int, typer.Option(help="What global random generators begin from.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Run a Flower app on this machine: its ServerApp here, its ClientApp in warm processes.

    Example: fedge flower run quickstart-pytorch --nodes 20 --run-config "num-server-rounds=5"
    """
    from fedge_flower.app import FlowerApp, parse_settings
    from fedge_sim.flower.simulation import simulate_app

    found = FlowerApp.load(folder)
    config = found.with_config(parse_settings(run_config or []))
    count = found.nodes if nodes is None else nodes
    with output_apart():
        done = simulate_app(found, config=config, nodes=count, workers=workers, seed=seed)
    if as_json:
        told = {"app": found.name, "nodes": done.nodes, "messages": done.messages, "replies": done.replies}
        typer.echo(json.dumps(told))
    else:
        typer.echo(
            f"{found.name} is done: {done.nodes} nodes, {done.messages} messages, {done.replies} replies"
        )
