"""`fedge server directory ...`: have the directory of the sites' keys signed on another machine, and look at it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography.hazmat.primitives.asymmetric import ec
from rich.table import Table

from fedge.console import plain_console
from fedge.errors import ConfigError, IdentityError, RunError
from fedge.files import private_folder, write_private
from fedge.principal import key_of_pem, key_to_pem
from fedge.secagg.directory import Directory, Statement
from fedge.signing import authority_to_pem, key_fingerprint
from fedge_server.certificates import new_key
from fedge_server.clock import now
from fedge_server.directories import Changes
from fedge_server.directory_file import read_signed, read_unsigned, write_directory
from fedge_server.identity import DAY_S
from fedge_server.key_files import read_key
from fedge_server.state import authority_beside

app = typer.Typer(
    help="Who signs with which key: the directory of the sites' keys, and its authority.",
    no_args_is_help=True,
    add_completion=False,
)

ServerToml = Annotated[Path, typer.Argument(metavar="SERVER.toml", help="Written by `fedge server init`.")]

_MAX_DAYS: Final = 3650
_KEY, _PUBLIC = "authority.key", "authority.pem"


@app.command()
def authority(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder on the machine that will sign.")],
) -> None:
    """Make the key of an authority apart from the coordinator: authority.key, and authority.pem for everybody.

    Example: fedge server directory authority vault
    """
    private_folder(folder)
    if (folder / _KEY).exists():
        raise IdentityError(f"{folder}: holds {_KEY} already; expected a new folder, or one without it")
    key = new_key()
    write_private(folder / _PUBLIC, authority_to_pem(key.public_key()))
    write_private(folder / _KEY, key_to_pem(key))
    typer.echo(f"  keep         {folder / _KEY}: whoever has it says whose key is whose")
    typer.echo(f"  coordinator  copy {folder / _PUBLIC} beside server.toml, as its [directory] authority")
    typer.echo(f"  every site   fedge client enrol ... --authority {_PUBLIC}")


@app.command()
def export(
    path: ServerToml,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the directory to be signed goes.")],
) -> None:
    """Write the directory that has to be signed next, for the machine where the authority's key lives.

    Example: fedge server directory export coordinator/server.toml --out pending.json
    """
    with authority_beside(path) as held:
        if not held.directories.apart:
            raise ConfigError(
                f"{path}: expected a [directory] authority, found none: the coordinator signs the directory by itself"
            )
        directory, changes = held.directories.pending(now=now()), held.directories.changes(now=now())
    write_directory(out, directory)
    typer.echo(f"epoch {directory.epoch}, {len(directory.statements)} sites: sign {out}")
    _print_changes(changes)


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by `fedge server directory export`.")],
    key: Annotated[Path, typer.Option(metavar="AUTHORITY.key", help="The authority's private key.")],
    out: Annotated[Path, typer.Option(metavar="SIGNED", help="Where the signed directory goes.")],
    valid_days: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MAX_DAYS,
            help="Days from now that every key is valid; else as its site's certificate.",
        ),
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(metavar="SIGNED", help="What was signed last, to compare with.")
    ] = None,
) -> None:
    """Sign a directory, where the authority's key lives: no coordinator is needed. Says what it changes.

    Example: fedge server directory sign pending.json --key vault/authority.key --out signed.json --previous last.json
    """
    private = key_of_pem(read_key(key))
    directory = read_unsigned(file)
    if valid_days is not None:
        until = int(now().timestamp()) + valid_days * DAY_S
        directory = replace(
            directory, statements=tuple(replace(each, not_after=until) for each in directory.statements)
        )
    before = _previous(previous, directory, private) if previous is not None else ()
    typer.echo(f"federation {directory.federation}, epoch {directory.epoch}")
    _print_changes(Changes.between(before, directory.statements), before, directory.statements)
    write_directory(out, directory, directory.sign(private))
    typer.echo(f"signed for {len(directory.statements)} sites: import {out}")


@app.command("import")
def import_directory(
    path: ServerToml,
    signed: Annotated[
        Path, typer.Argument(metavar="SIGNED", help="Written by `fedge server directory sign`.")
    ],
) -> None:
    """Make a signed directory the one that sites are shown; a coordinator that runs takes it at once.

    Example: fedge server directory import coordinator/server.toml signed.json
    """
    with authority_beside(path) as held:
        found = read_signed(signed)
        held.directories.take(found, now=now())
        changes = held.directories.changes(now=now())
    typer.echo(f"epoch {found.directory.epoch}, {len(found.directory.statements)} sites")
    if changes.any:
        typer.echo("what has changed since it was exported is pending:")
        _print_changes(changes)


@app.command()
def renew(path: ServerToml) -> None:
    """Sign the directory anew with a higher epoch, on a coordinator that signs by itself: after a restore.

    Example: fedge server directory renew coordinator/server.toml
    """
    with authority_beside(path) as held:
        found = held.directories.renew(now=now())
    typer.echo(f"epoch {found.directory.epoch}, {len(found.directory.statements)} sites")


@app.command()
def show(
    path: ServerToml, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show the directory as sites are shown it, and what is pending: what it does not say yet.

    Example: fedge server directory show coordinator/server.toml --json
    """
    newest: Directory | None = None
    missing = ""
    with authority_beside(path) as held:
        changes = held.directories.changes(now=now())
        try:
            newest = held.directories.newest().directory
        except RunError as error:
            missing = str(error)
        apart, federation = held.directories.apart, held.federation
    rows = [_row(each) for each in newest.statements] if newest is not None else []
    epoch = newest.epoch if newest is not None else None
    if as_json:
        found = {"federation": federation, "apart": apart, "epoch": epoch, "sites": rows}
        typer.echo(json.dumps(found | {"pending": asdict(changes)}))
        return
    if newest is None:
        typer.echo(missing)
    else:
        signer = "an authority apart" if apart else "the federation's CA"
        typer.echo(f"federation {federation}, epoch {epoch}, signed by {signer}")
        table = Table("site", "signs with", "from", "until")
        for row in rows:
            table.add_row(row["site"], row["key"], row["not_before"], row["not_after"])
        plain_console().print(table)
    if changes.any:
        typer.echo("pending:")
        _print_changes(changes)


def _previous(path: Path, new: Directory, key: ec.EllipticCurvePrivateKey) -> tuple[Statement, ...]:
    """The statements that the authority has signed last, if `new` may follow on them."""
    last = read_signed(path)
    last.directory.check(last.signature, key.public_key(), federation=new.federation, now_s=0.0)
    if new.epoch <= last.directory.epoch:
        raise IdentityError(
            f"expected a directory of an epoch after {last.directory.epoch}, which was signed last, found {new.epoch}: "
            "export it anew"
        )
    return last.directory.statements


def _print_changes(
    changes: Changes, old: tuple[Statement, ...] = (), new: tuple[Statement, ...] = ()
) -> None:
    """A line for each site: added, removed, with another key, or valid for longer; with keys where they are known."""
    before, after = ({each.site: key_fingerprint(each.key) for each in part} for part in (old, new))
    for site in changes.added:
        typer.echo(f"  added     {site} {after.get(site, '')}".rstrip())
    for site in changes.removed:
        typer.echo(f"  removed   {site} {before.get(site, '')}".rstrip())
    for site in changes.rekeyed:
        keys = f" {before[site]} -> {after[site]}" if site in before else ""
        typer.echo(f"  new key   {site}{keys}")
    for site in changes.extended:
        typer.echo(f"  extended  {site}")
    if not changes.any:
        typer.echo("  nothing has changed")


def _row(statement: Statement) -> dict[str, str]:
    start, until = (
        datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
        for at in (statement.not_before, statement.not_after)
    )
    return {
        "site": statement.site,
        "key": key_fingerprint(statement.key),
        "not_before": start,
        "not_after": until,
    }
