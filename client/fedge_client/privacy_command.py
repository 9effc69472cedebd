"""`fedge privacy plan`: what a run would cost before anybody trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedge.console import plain_console
from fedge.errors import ConfigError, RefusedError
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge_client.plan import AtSite, Cost, at_site, cost_of, fewest_clients

app = typer.Typer(help="Plan a run's privacy.", no_args_is_help=True, add_completion=False)

_MUCH = 1.1
_SIZES = (100, 1_000, 10_000)


@app.callback()
def _group() -> None:
    """Keeps `plan` a command of its own name, alone as it is."""


@app.command()
def plan(
    path: Annotated[Path, typer.Argument(metavar="RUN.toml")],
    examples: Annotated[
        list[int] | None, typer.Option(help="Training examples of a site; may be repeated.", min=1)
    ] = None,
    client: Annotated[
        Path | None, typer.Option(metavar="CLIENT.toml", help="Ask this site's data, policy and ledger.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run would cost each site, and with --client what it would leave of this site's budget.

    Exits non-zero if the site would refuse the run. Nothing is spent or reserved.

    Example: fedge privacy plan run.toml --examples 500 --examples 20000
    """
    run = RunConfig.load(path)
    if client is not None:
        if examples:
            raise ConfigError("--examples: the site's own data says how many; leave it out with --client")
        found = at_site(run, client)
        typer.echo(json.dumps(found.as_dict())) if as_json else _print_site(run, found)
        if found.refusal:
            raise RefusedError(
                Refusal(RefusalCode.WORK_NOT_ALLOWED, f"this site would refuse the run: {found.refusal}")
            )
        return
    if run.privacy.unit == "client":
        examples = [1]  # a round is one release of all that a site has, however much that is
    folder = path.resolve().parent
    costs = [cost_of(run, size, folder=folder) for size in examples or _SIZES]
    typer.echo(json.dumps([cost.as_dict() for cost in costs])) if as_json else _print_costs(run, costs)


def _print_costs(run: RunConfig, costs: list[Cost]) -> None:
    console = plain_console()
    privacy = run.privacy
    asked = f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else "the noise that it fixes"
    console.print(
        f"{run.name}: {privacy.unit}-level privacy, {asked} at delta {privacy.delta:g}, clip {privacy.clip:g}, "
        f"{run.rounds} rounds",
    )
    table = Table(box=None, pad_edge=False)
    of_examples = privacy.unit == "example"
    for name in ("examples", "sampling rate", "steps a round") if of_examples else ():
        table.add_column(name, justify="right")
    for name in ("noise multiplier", "epsilon", "epsilon (RDP)"):
        table.add_column(name, justify="right")
    for cost in costs:
        sampling = (str(cost.examples), f"{cost.sampling_rate:.4g}", str(cost.steps))
        table.add_row(
            *(sampling if of_examples else ()),
            f"{cost.noise_multiplier:.4g}",
            f"{cost.epsilon:.4g}",
            f"{cost.admission_epsilon:.4g}",
        )
    console.print(table)
    _say_rounding(console, costs[0])
    console.print(
        f"epsilon as stated to people ({costs[0].accountant}), and as a site's gate counts (RDP); a site that "
        "takes part in fewer rounds spends less",
    )
    if privacy.max_participations is not None or privacy.separation > 1:
        console.print(f"it needs at least {fewest_clients(run)} sites to come to its end")


def _say_rounding(console: Console, cost: Cost) -> None:
    """Where a part of the noise is for what rounding adds, more bits do more than a larger epsilon."""
    if cost.rounding > _MUCH:
        console.print(
            f"rounding to the grid of the secure sums adds {cost.rounding - 1:.0%} to the norm that noise is made for: "
            "raise secure_aggregation.bits, or set its rotate = true",
            style="yellow",
        )


def _print_site(run: RunConfig, found: AtSite) -> None:
    console = plain_console()
    size = f"{found.examples} training examples" if found.examples else "with data that only its task knows"
    console.print(f"{run.name} at this site: {size}")
    if found.cost is not None and found.run_epsilon is not None:
        console.print(f"  noise multiplier  {found.cost.noise_multiplier:.4g}")
        for release in found.cost.releases:
            console.print(f"  releases          {release}")
        _say_rounding(console, found.cost)
        console.print(
            f"  the run's epsilon {found.cost.epsilon:.4g} at delta {found.cost.delta:g} "
            f"({found.cost.accountant}); {found.run_epsilon:.4g} by RDP at this site's delta {found.delta:g}",
        )
    elif not found.refusal:
        console.print("  no differential privacy: nothing bounds what the run learns of this data")
    console.print(f"  spent before      {found.spent_before:.4g} of {found.cap:g}")
    if found.spent_after is not None:
        left = max(0.0, found.cap - found.spent_after)
        console.print(f"  spent after       {found.spent_after:.4g}, which leaves {left:.4g}")
        if found.spent_after > found.cap and not found.refusal:
            console.print(
                "  the budget ends before the run does: this site would stop taking part", style="yellow"
            )
