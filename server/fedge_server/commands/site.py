"""`fedge site list|spent|revoke`: who is in the federation, and what its runs may have spent of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from fedge.console import plain_console
from fedge.privacy.population import population
from fedge.wire import fedge_pb2 as pb
from fedge_server.commands.link import CALL_S, AdminToml, admin_link

app = typer.Typer(help="See and revoke sites.", no_args_is_help=True, add_completion=False)


@app.command("list")
def list_sites(
    admin: AdminToml, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List every site that was ever enrolled.

    Example: fedge site list --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        sites = link.Sites(pb.SitesRequest(), timeout=CALL_S).sites
    rows = [
        {
            "name": site.name,
            "state": "revoked" if site.revoked else "connected" if site.connected else "away",
            "enrolled_at": datetime.fromtimestamp(site.enrolled_at, UTC).isoformat(timespec="seconds"),
        }
        for site in sites
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("site", "state", "enrolled")
    for row in rows:
        table.add_row(row["name"], row["state"], row["enrolled_at"])
    plain_console().print(table)


@app.command()
def spent(
    admin: AdminToml, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Say what all runs of this coordinator may have spent of each site's privacy, by what they promised.

    A site's own ledger counts more closely. Example: fedge site spent --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        runs = link.List(pb.ListRequest(), timeout=CALL_S).runs
        replies = [link.Statement(pb.RunRef(run_id=run.run_id), timeout=CALL_S) for run in runs]
    found = population(json.loads(reply.statement) for reply in replies)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    table = Table("site", "unit", "runs", "epsilon", "at delta", "runs without a bound")
    for each in found:
        bounded = each.runs > each.unbounded
        table.add_row(
            each.site,
            each.unit,
            str(each.runs),
            f"{each.epsilon:.4g}" if bounded else "",
            f"{each.delta:.3g}" if bounded else "",
            str(each.unbounded or ""),
        )
    plain_console().print(table)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The site.")], admin: AdminToml) -> None:
    """Refuse a site from now on and end its session. Only a new token lets it in again.

    Example: fedge site revoke st-mary --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        link.Revoke(pb.SiteRef(name=name), timeout=CALL_S)
    typer.echo(f"{name} is revoked")
