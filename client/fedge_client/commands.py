"""`fedge client enrol|start|check`: what the engineer of a site types."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedge.console import plain_console
from fedge.errors import ConfigError, FedgeError
from fedge.files import read_capped
from fedge.signing import key_fingerprint, public_bytes
from fedge_client.check import run_checks
from fedge_client.enrolment import MAX_PEM_BYTES, enrol_site
from fedge_client.ledger_report import Place, accept, print_report, report
from fedge_client.ledger_report import verify as recompute
from fedge_client.settings import load_client

app = typer.Typer(help="Run a site's client.", no_args_is_help=True, add_completion=False)

ClientToml = Annotated[Path, typer.Argument(metavar="CLIENT.toml", help="Written by `fedge client enrol`.")]


@app.command()
def enrol(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator.")],
    token: Annotated[str, typer.Option(help="The one-time token from its operator.")],
    ca: Annotated[Path, typer.Option(metavar="FILE", help="The coordinator's ca.pem.")],
    folder: Annotated[
        Path, typer.Option("--dir", help="Where keys and client.toml go; private to this user.")
    ],
    authority: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Whose signature the directory of the sites' keys needs, if not the CA's: authority.pem.",
        ),
    ] = None,
) -> None:
    """Make this site's keys, have them certified with a one-time token, and write client.toml.

    Example: fedge client enrol --server fl.example.org:8443 --token "$TOKEN" --ca ca.pem --dir site
    """
    ca_pem = read_capped(ca, max_bytes=MAX_PEM_BYTES)
    authority_pem = read_capped(authority, max_bytes=MAX_PEM_BYTES) if authority is not None else None
    identity = asyncio.run(
        enrol_site(server, token, ca_pem=ca_pem, folder=folder, authority_pem=authority_pem)
    )
    path = folder / "client.toml"
    console = plain_console()
    console.print(f"site {identity.site} is enrolled until {identity.principal.not_after:%Y-%m-%d}")
    console.print(f"  signs as  {key_fingerprint(public_bytes(identity.signing))}")
    console.print(f"  check it  fedge client check {path}")
    console.print(f"  start it  fedge client start {path}")


@app.command()
def start(path: ClientToml, verbose: Annotated[bool, typer.Option(help="Log more.")] = False) -> None:
    """Take part in the coordinator's runs until Ctrl-C or SIGTERM.

    Example: fedge client start site/client.toml
    """
    load_client(path)  # a mistake in the file is told here, in colour
    sys.stdout.flush()
    sys.stderr.flush()
    # The same process goes on as the agent alone, without what only the command line needed.
    os.execv(  # noqa: S606  # our own interpreter and module
        sys.executable,
        [sys.executable, "-m", "fedge_client", *(["--verbose"] if verbose else []), "--", str(path)],
    )


@app.command()
def check(
    path: ClientToml,
    task: Annotated[
        str | None, typer.Option(help="Also load this task ('module:attribute') and its data.")
    ] = None,
) -> None:
    """Preflight: settings, identity, link, budget, and with --task the task and its data on this site.

    Example: fedge client check site/client.toml --task app:task
    """
    console = plain_console()
    failed: FedgeError | None = None
    for name, outcome in run_checks(path, task):
        if isinstance(outcome, FedgeError):
            failed = failed or outcome
            console.print(Text.assemble(("failed", "red"), f"  {name}"))
        else:
            console.print(Text.assemble(("ok", "green"), f"      {name}: {outcome}"))
    if failed is not None:
        raise failed


@app.command()
def ledger(
    path: Annotated[
        Path,
        typer.Argument(metavar="CLIENT.toml", help="Or the folder in which a Flower client keeps ledgers."),
    ],
    dataset: Annotated[
        str | None, typer.Option(help="In such a folder: the ledger of this data set, not all of them.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute epsilon from every record, with another accountant.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Accept a ledger that you moved or restored on purpose; recorded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what was spent of this site's data set, and what is left of its budget.

    Example: fedge client ledger site/client.toml --verify
    """
    places = _places(path, dataset)
    console = plain_console()
    for place in places if trust else ():
        accepted = accept(place, reason="accepted by `fedge client ledger --trust`")
        console.print(
            "accepted as it is, and recorded" if accepted else "nothing to do: it was accepted already"
        )
    found = [(report(place), recompute(place) if verify else None) for place in places]
    if as_json:
        objects = [each.as_dict() | {"verified": checked} for each, checked in found]
        typer.echo(json.dumps(objects if path.is_dir() else objects[0]))
        return
    for each, checked in found:
        print_report(console, each)
        if checked is not None:
            console.print(
                f"verified: {checked} records, their chain and head, and every epsilon by another accountant"
            )


def _places(path: Path, dataset: str | None) -> list[Place]:
    if path.is_dir():
        return Place.each_in(path.resolve(), dataset)
    if dataset is not None:
        raise ConfigError("--dataset: client.toml says which data set it is; leave it out")
    return [Place.of(load_client(path), path.parent.resolve())]
