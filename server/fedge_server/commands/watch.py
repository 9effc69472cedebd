"""Follows a run: a progress bar where a person looks on, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import json

import typer
from rich.progress import SpinnerColumn

from fedge.console import live_progress, plain_console
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge_server.commands.show import row_as_dict


def watch_run(link: services.AdminStub, run_id: str, *, as_json: bool = False) -> pb.RunSummary:
    """Follow the run until it is over and return how it ended. Progress goes to standard error.

    A stream without a deadline on purpose: a run may wait for days, and its own deadlines end it.
    """
    summary = pb.RunSummary(run_id=run_id)
    console = plain_console(stderr=True)
    live = console.is_terminal and not as_json
    with live_progress(console, SpinnerColumn(), live=live) as progress:
        bar = progress.add_task(run_id, total=None, note="")
        shown, told = 0, ""
        for event in link.Watch(pb.RunRef(run_id=run_id)):
            summary = event.summary
            for row in event.history:
                if as_json:
                    typer.echo(json.dumps(row_as_dict(row)))
                elif not live:
                    again = "evaluated  " if row.round <= shown else ""
                    line = f"round {row.round}/{summary.rounds}  {again}{_line(row)}"
                    console.print(line)
                    shown = max(shown, row.round)
            last = _line(event.history[-1]) if event.history else ""
            note = summary.reason or last or summary.progress
            progress.update(bar, total=summary.rounds, completed=summary.round, note=note)
            # Between rounds the lines say enough; a round that takes long says who it is waiting for.
            standing = summary.reason if summary.status == "waiting" else "" if last else summary.progress
            if not live and not as_json and standing and standing != told:
                console.print(standing)
            told = standing
    if not as_json:
        console.print(f"{run_id} {summary.status} {summary.reason}".rstrip())
    return summary


def _line(row: pb.HistoryRow) -> str:
    metrics = "  ".join(f"{metric.name} {metric.value:.4f}" for metric in row.metrics)
    return f"{len(row.clients)} clients  {metrics}  {row.seconds:.3f} s"
