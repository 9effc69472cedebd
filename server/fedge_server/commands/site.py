"""`fedge site list|revoke`: who is in the federation."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

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
    Console().print(table)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The site.")], admin: AdminToml) -> None:
    """Refuse a site from now on and end its session. Only a new token lets it in again.

    Example: fedge site revoke st-mary --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        link.Revoke(pb.SiteRef(name=name), timeout=CALL_S)
    typer.echo(f"{name} is revoked")
