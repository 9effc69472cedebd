"""`fedge server init|start|token`: what the operator of a coordinator types."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tomlkit
import typer

from fedge.console import plain_console
from fedge.errors import ConfigError
from fedge.files import private_folder, write_private
from fedge.logs import configure_logging
from fedge.wire.address import split_address
from fedge_server.app import serve
from fedge_server.clock import now
from fedge_server.commands import directory
from fedge_server.identity import DAY_S, Authority
from fedge_server.settings import AdminSettings, ServerSettings, load_server
from fedge_server.state import authority_beside, database_of
from fedge_server.store.registry import Registry

app = typer.Typer(help="Run a coordinator.", no_args_is_help=True, add_completion=False)
app.add_typer(directory.app, name="directory")

_EVERYWHERE = ("0.0.0.0", "::", "[::]")  # noqa: S104  # compared with, not bound to
ServerToml = Annotated[Path, typer.Argument(metavar="SERVER.toml", help="Written by `fedge server init`.")]


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder for keys, records and server.toml.")
    ],
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:8443",
    host: Annotated[
        list[str] | None,
        typer.Option(help="A further DNS name or address under which sites reach it; may be repeated."),
    ] = None,
    database: Annotated[
        str,
        typer.Option(
            help="A PostgreSQL URL (postgresql://user@host/name); without one, SQLite in DIR/state."
        ),
    ] = "",
) -> None:
    """Make a CA, the coordinator's certificate, server.toml and an admin credential.

    Example: fedge server init coordinator --listen 0.0.0.0:8443 --host fl.example.org
    """
    try:
        bound, port = split_address(listen)
    except ValueError as error:
        raise ConfigError(f"--listen: {error}") from None
    if (folder / "server.toml").exists():
        raise ConfigError(
            f"expected a new folder, found {folder / 'server.toml'} there: choose another folder"
        )
    hosts = [bound, *(host or [])]
    reachable = next((name for name in [*(host or []), bound] if name not in _EVERYWHERE), "localhost")
    settings = ServerSettings(listen=listen, database=database)
    records = database_of(settings, private_folder(folder))
    records.open()
    try:
        authority, admin = Authority.create(folder, Registry(records), hosts=hosts, now=now())
    finally:
        records.close()
    _write_toml(
        folder / "server.toml",
        "The coordinator of one federation. `fedge server start` reads this file.",
        {"listen": listen} | ({"database": database} if database else {}),
    )
    write_private(folder / "admin.pem", admin.certificate_pem)
    write_private(folder / "admin.key", admin.key_pem)
    bracketed = f"[{reachable}]" if ":" in reachable else reachable
    credential = AdminSettings(server=f"{bracketed}:{port}")
    _write_toml(
        folder / "admin.toml",
        "An administrator's credential: `fedge run ... --admin` reads this file. Keep the folder private.",
        credential.model_dump(),
    )
    console = plain_console()
    if bound in _EVERYWHERE and not host:
        console.print(
            "note: its certificate names only this machine's loopback, so no other machine can "
            "connect: repeat this in a new folder with --host NAME, the name under which sites reach it",
            style="yellow",
        )
    console.print(f"federation {authority.federation} is set up in {folder}")
    console.print(f"  start it      fedge server start {folder / 'server.toml'}")
    console.print(f"  let a site in fedge server token {folder / 'server.toml'} --site NAME")
    console.print(f"  its CA        {folder / 'ca.pem'} (give it to every site)")


@app.command()
def start(path: ServerToml, verbose: Annotated[bool, typer.Option(help="Log more.")] = False) -> None:
    """Run the coordinator until Ctrl-C or SIGTERM.

    Example: fedge server start coordinator/server.toml
    """
    settings = load_server(path)
    configure_logging(verbose=verbose)
    host, _ = split_address(settings.listen)
    console = plain_console(stderr=True)

    def ready(port: int) -> None:
        console.print(f"coordinator ready on {host}:{port}; Ctrl-C stops it")

    asyncio.run(serve(settings, path.parent, ready=ready))


@app.command()
def token(
    path: ServerToml,
    site: Annotated[str, typer.Option(help="The site that may enrol with it.")],
    valid_hours: Annotated[float, typer.Option(help="Hours until it expires.")] = 24.0,
) -> None:
    """Print a one-time enrolment token for a site, alone on the last line.

    Example: fedge server token coordinator/server.toml --site st-mary
    """
    with authority_beside(path) as authority:
        text = authority.issue_token(site, now=now(), valid_for_s=valid_hours * DAY_S / 24)
    plain_console(stderr=True).print(
        f"one-time token for {site}, valid {valid_hours:g} h; give it to that site alone"
    )
    typer.echo(text)


def _write_toml(path: Path, comment: str, table: Mapping[str, object]) -> None:
    document = tomlkit.document()
    document.add(tomlkit.comment(comment))
    for key, value in table.items():
        document.add(key, tomlkit.item(value))
    write_private(path, tomlkit.dumps(document))
