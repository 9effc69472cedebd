"""`fedge run submit|list|show|watch|stop|export`: what the owner of a run types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from fedge.checkpoint import to_safetensors
from fedge.config import read_toml
from fedge.console import plain_console
from fedge.errors import ConfigError, RunError
from fedge.files import read_capped, write_atomic
from fedge.principal import MAX_CERTIFICATE_BYTES
from fedge.privacy.statement import MAX_STATEMENT_BYTES, document, verify
from fedge.run import RunConfig
from fedge.strategy import load_strategy
from fedge.task import first_model, load_any_task
from fedge.vector import Model, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.codec import decode_layout, encode_blob, encode_layout
from fedge.wire.limits import CHUNK_BYTES, Limits, check_size
from fedge_server.commands.link import CALL_S, AdminToml, admin_link
from fedge_server.commands.show import history_table, protection, row_as_dict, summary_as_dict
from fedge_server.commands.watch import watch_run

app = typer.Typer(help="Submit and follow runs.", no_args_is_help=True, add_completion=False)

_BULK_S = 3600.0
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `fedge run submit` printed it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def submit(
    path: Annotated[Path, typer.Argument(metavar="RUN.toml")],
    admin: AdminToml,
    watch: Annotated[bool, typer.Option(help="Follow the run; exit non-zero if it fails.")] = False,
) -> None:
    """Begin a run: builds its initial model here, from the task beside RUN.toml. Prints its id last.

    Example: fedge run submit run.toml --admin coordinator/admin.toml --watch
    """
    config = RunConfig.load(path)
    console = plain_console(stderr=True)
    for note in config.notes():
        console.print(f"note: {note}")
    model = initial_model(config, folder=path.parent.resolve())
    with admin_link(admin) as link:
        run_id = begin_run(link, read_toml(path), model)
        if watch:
            console.print(f"run {run_id}: {model.layout.size} parameters, {config.rounds} rounds")
            summary = watch_run(link, run_id)
    typer.echo(run_id)
    if watch:
        _fail_unless_done(summary)


def initial_model(config: RunConfig, *, folder: Path) -> Model:
    """The seeded model of a run's task, whose code is searched in `folder` first.

    Raises:
        ConfigError, TaskError: the strategy's settings are wrong, or the task cannot be had here.
        RefusedError: the run is to protect examples, and the model cannot be trained so; with the remedy.
    """
    # Only what is not installed here is left to the coordinator's own list of strategies.
    if ":" not in config.strategy.name:
        load_strategy(config)
    task = load_any_task(config.task, path=folder)
    if left_out := config.left_out(task.metrics):
        plain_console(stderr=True).print(f"note: {left_out}")
    return first_model(task, seed=config.seed, unit=config.privacy.unit, personal=config.work.personal)


def begin_run(link: services.AdminStub, run_toml: str, model: Model) -> str:
    """Submit a run and return its id."""
    return link.Submit(_submission(run_toml, model), timeout=_BULK_S).run_id


@app.command("list")
def list_runs(admin: AdminToml, as_json: AsJson = False) -> None:
    """List the coordinator's runs.

    Example: fedge run list --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        runs = link.List(pb.ListRequest(), timeout=CALL_S).runs
    if as_json:
        typer.echo(json.dumps([summary_as_dict(run) for run in runs]))
        return
    table = Table("run", "status", "round", "strategy", "note")
    for run in runs:
        table.add_row(
            run.run_id,
            run.status,
            f"{run.round}/{run.rounds}" if run.rounds else "",
            run.strategy.split("(")[0],
            run.reason,
        )
    plain_console().print(table)


@app.command()
def show(run_id: RunId, admin: AdminToml, as_json: AsJson = False) -> None:
    """Show one run: its state, its sites and why any of them refused, its history.

    Example: fedge run show icu-vitals-1f2e3d4c --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        detail = link.Show(pb.RunRef(run_id=run_id), timeout=CALL_S)
    clients = [
        {"name": client.name, "state": client.state, "detail": client.detail} for client in detail.clients
    ]
    if as_json:
        body = summary_as_dict(detail.summary) | {
            "clients": clients,
            "history": [row_as_dict(row) for row in detail.history],
            "model_bytes": detail.model_bytes,
            "protection": protection(detail.run_toml),
            "run_toml": detail.run_toml,
        }
        typer.echo(json.dumps(body))
        return
    summary = detail.summary
    console = plain_console()
    console.print(f"{summary.run_id}: {summary.status}, round {summary.round} of {summary.rounds}")
    if summary.reason:
        console.print(f"  {summary.reason}")
    if summary.progress:
        console.print(f"  {summary.progress}")
    console.print(f"  strategy    {summary.strategy}")
    console.print(f"  model       {detail.model_bytes} bytes")
    console.print(f"  protection  {protection(detail.run_toml)}")
    for client in clients:
        console.print(f"  {client['state']:<10}  {client['name']}  {client['detail']}")
    console.print(history_table(detail.history))


@app.command()
def watch(run_id: RunId, admin: AdminToml, as_json: AsJson = False) -> None:
    """Follow a run until it is over; exits non-zero if it failed. With --json a line per round.

    Example: fedge run watch icu-vitals-1f2e3d4c --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        summary = watch_run(link, run_id, as_json=as_json)
    _fail_unless_done(summary)


@app.command()
def stop(run_id: RunId, admin: AdminToml) -> None:
    """End a run. The model of its last complete round can still be exported.

    Example: fedge run stop icu-vitals-1f2e3d4c --admin coordinator/admin.toml
    """
    with admin_link(admin) as link:
        link.Stop(pb.RunRef(run_id=run_id), timeout=CALL_S)
    typer.echo(f"{run_id} is stopped")


@app.command()
def export(
    run_id: RunId,
    admin: AdminToml,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
) -> None:
    """Write the model of the last complete round, under its own state_dict names.

    Example: fedge run export icu-vitals-1f2e3d4c --admin coordinator/admin.toml --out model.safetensors
    """
    with admin_link(admin) as link:
        model = fetch_model(link, run_id)
    write_atomic(out, to_safetensors(model, metadata={"fedge_run": run_id}))
    typer.echo(f"wrote {out}: {model.layout.size} parameters", err=True)


@app.command()
def statement(
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN_ID]", help="Of a coordinator's run.")] = None,
    admin: Annotated[Path | None, typer.Option("--admin", metavar="ADMIN.toml")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the signed statement to this file.")] = None,
    check: Annotated[
        Path | None, typer.Option("--verify", metavar="FILE", help="Check a signed statement instead.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="The CA to check it with.")] = None,
) -> None:
    """Print a run's statement of differential privacy, signed by its coordinator; or check one with --verify.

    Example: fedge run statement icu-vitals-1f2e3d4c --admin coordinator/admin.toml --out statement.json
    """
    if check is not None:
        if ca is None or run_id is not None:
            raise ConfigError("--verify: expected FILE with --ca FILE, and no run")
        text = read_capped(check, max_bytes=2 * MAX_STATEMENT_BYTES).decode("utf-8", "replace")
        found = verify(text, ca_pem=read_capped(ca, max_bytes=MAX_CERTIFICATE_BYTES))
        typer.echo(json.dumps(found, indent=2))
        return
    if run_id is None or admin is None:
        raise ConfigError("expected RUN_ID and --admin ADMIN.toml, or --verify FILE and --ca FILE")
    with admin_link(admin) as link:
        reply = link.Statement(pb.RunRef(run_id=run_id), timeout=CALL_S)
    if out is not None:
        write_atomic(out, document(reply.statement, reply.signature, reply.certificate))
        typer.echo(f"wrote {out}", err=True)
    typer.echo(json.dumps(json.loads(reply.statement), indent=2))


def _submission(text: str, model: Model) -> Iterator[pb.SubmitRequest]:
    view = bytes_of(model.vector)
    blob = encode_blob(view, inline_bytes=-1)
    yield pb.SubmitRequest(
        submission=pb.Submission(run_toml=text, layout=encode_layout(model.layout), model=blob)
    )
    for start in range(0, len(view), CHUNK_BYTES):
        yield pb.SubmitRequest(data=bytes(view[start : start + CHUNK_BYTES]))


def fetch_model(link: services.AdminStub, run_id: str) -> Model:
    """The model of a run's last committed round."""
    replies = iter(link.Export(pb.RunRef(run_id=run_id), timeout=_BULK_S))
    layout = decode_layout(next(replies).layout)
    data = bytearray(Limits(max_model_bytes=1 << 40).check_model(layout.nbytes))
    received = 0
    for reply in replies:
        check_size("a model", received + len(reply.data), len(data))
        data[received : received + len(reply.data)] = reply.data
        received += len(reply.data)
    if received != len(data):
        raise RunError(f"expected a model of {len(data)} bytes, found {received}")
    return Model(np.frombuffer(data, np.dtype("<f4")), layout)


def _fail_unless_done(summary: pb.RunSummary) -> None:
    if summary.status != "done":
        raise RunError(f"run {summary.run_id} {summary.status} at round {summary.round}: {summary.reason}")
