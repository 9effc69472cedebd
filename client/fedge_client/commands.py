"""`fedge client enrol|start|check`: what the engineer of a site types."""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tomlkit
import typer
from rich.console import Console

from fedge.cli import configure_logging
from fedge.errors import ConfigError, FedgeError
from fedge.files import private_folder, read_capped, write_private
from fedge.wire.address import check_address
from fedge_client.agent import Agent
from fedge_client.check import run_checks
from fedge_client.identity import accept_certificate, make_csr, open_token, save_identity
from fedge_client.link import Link
from fedge_client.settings import load_client

app = typer.Typer(help="Run a site's client.", no_args_is_help=True)

_MAX_PEM_BYTES = 64 << 10
ClientToml = Annotated[Path, typer.Argument(metavar="CLIENT.toml", help="Written by `fedge client enrol`.")]

_HEADER = """\
This site's client. `fedge client start` reads this file; `fedge client check` says whether it is right.

[task]    path = "."           the folder of the task code that you installed here
[policy]  tasks = ["app:task"] which tasks may run; without it, those in the task folder
[worker]  memory_mb, hang_s, threads
[data]    any keys: your task gets them as `site.config`"""


@app.command()
def enrol(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator.")],
    token: Annotated[str, typer.Option(help="The one-time token from its operator.")],
    ca: Annotated[Path, typer.Option(metavar="FILE", help="The coordinator's ca.pem.")],
    folder: Annotated[
        Path, typer.Option("--dir", help="Where keys and client.toml go; private to this user.")
    ],
) -> None:
    """Make this site's key, have it certified with a one-time token, and write client.toml.

    Example: fedge client enrol --server fl.example.org:8443 --token "$TOKEN" --ca ca.pem --dir site
    """
    try:
        check_address(server)
    except ValueError as error:
        raise ConfigError(f"--server: {error}") from None
    ca_pem = read_capped(ca, max_bytes=_MAX_PEM_BYTES)
    now = datetime.now(UTC)
    opened = open_token(token, ca_pem=ca_pem, now=now)
    private_folder(folder)  # before the token is spent: a folder that cannot be made must not cost it
    key_pem, csr = make_csr()

    async def ask() -> bytes:
        link = Link(server, ca_pem=ca_pem, key_pem=opened.key_pem, certificate_pem=opened.certificate_pem)
        try:
            return await link.enrol(csr)
        finally:
            await link.close()

    certificate = asyncio.run(ask())
    identity = accept_certificate(certificate, key_pem=key_pem, ca_pem=ca_pem, site=opened.site, now=now)
    save_identity(folder, identity)
    path = folder / "client.toml"
    if path.exists():
        typer.echo(f"{path} is kept as it is", err=True)
    else:
        _write_client_toml(path, server)
    console = Console()
    console.print(
        f"site {identity.site} is enrolled until {identity.principal.not_after:%Y-%m-%d}", highlight=False
    )
    console.print(f"  check it  fedge client check {path}", highlight=False)
    console.print(f"  start it  fedge client start {path}", highlight=False)


@app.command()
def start(path: ClientToml, verbose: Annotated[bool, typer.Option(help="Log more.")] = False) -> None:
    """Take part in the coordinator's runs until Ctrl-C or SIGTERM.

    Example: fedge client start site/client.toml
    """
    settings = load_client(path)
    configure_logging(verbose=verbose)

    async def serve() -> None:
        agent = Agent(settings, path)
        task = asyncio.ensure_future(agent.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            Console(stderr=True).print(f"site {agent.site} stopped", highlight=False)

    asyncio.run(serve())


@app.command()
def check(
    path: ClientToml,
    task: Annotated[
        str | None, typer.Option(help="Also load this task ('module:attribute') and its data.")
    ] = None,
) -> None:
    """Preflight: settings, identity, link, and with --task the task and its data on this site.

    Example: fedge client check site/client.toml --task app:task
    """
    console = Console()
    failed: FedgeError | None = None
    for name, outcome in run_checks(path, task):
        if isinstance(outcome, FedgeError):
            failed = failed or outcome
            console.print(f"[red]failed[/]  {name}", highlight=False)
        else:
            console.print(f"[green]ok[/]      {name}: {outcome}", highlight=False)
    if failed is not None:
        raise failed


def _write_client_toml(path: Path, server: str) -> None:
    document = tomlkit.document()
    for line in _HEADER.splitlines():
        document.add(tomlkit.comment(line) if line else tomlkit.nl())
    document.add("server", server)
    write_private(path, tomlkit.dumps(document))
