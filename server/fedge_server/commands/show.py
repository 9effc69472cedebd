"""Runs and rounds as tables for people and as dictionaries for programs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from fedge.config import parse_toml
from fedge.history import plain_metrics
from fedge.run import RunConfig
from fedge.secagg.terms import asked_of, least_of
from fedge.wire import fedge_pb2 as pb


def protection(run_toml: str) -> str:
    """What protects a run's updates, in words."""
    run = parse_toml(run_toml, RunConfig, source="run.toml")
    return f"mutual TLS; {_privacy(run)}; {_aggregation(run)}"


def _privacy(run: RunConfig) -> str:
    privacy = run.privacy
    if privacy.unit == "none":
        return "no differential privacy"
    epsilon = f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else "noise as the run says"
    if privacy.unit == "example":
        noise = "noise is in before they leave"
    elif run.secure_aggregation.enabled:
        noise = "the sites add the noise inside the sum"
    else:
        noise = "the coordinator adds the noise"
    return f"{privacy.unit}-level differential privacy, {epsilon} at delta {privacy.delta:g}: {noise}"


def _aggregation(run: RunConfig) -> str:
    secure = run.secure_aggregation
    if not secure.enabled:
        return "no secure aggregation: the coordinator sees each update"
    least = least_of(run.cohort.needed, asked_of(run.cohort))
    honest = "" if secure.consistency else " unless it lies"
    return (
        f"secure aggregation ({secure.suite}): the coordinator can read sums of {least} updates or more, and no "
        f"update{honest}"
    )


def summary_as_dict(run: pb.RunSummary) -> dict[str, Any]:
    """A run as `fedge run list --json` shows it."""
    return {
        "id": run.run_id,
        "name": run.name,
        "status": run.status,
        "round": run.round,
        "rounds": run.rounds,
        "reason": run.reason,
        "progress": run.progress,
        "strategy": run.strategy,
        "submitted_at": datetime.fromtimestamp(run.submitted_at, UTC).isoformat(timespec="seconds"),
    }


def row_as_dict(row: pb.HistoryRow) -> dict[str, Any]:
    """A committed round; metrics are flattened beside the rest."""
    return {
        "round": row.round,
        "attempt": row.attempt,
        "clients": list(row.clients),
        "num_examples": row.num_examples,
        "seconds": row.seconds,
        "bytes_down": row.bytes_down,
        "bytes_up": row.bytes_up,
        "refused": row.refused,
        "staleness": row.staleness,
        "metrics": plain_metrics({metric.name: metric.value for metric in row.metrics}),
    }


def history_table(rows: Sequence[pb.HistoryRow], *, last: int = 20) -> Table:
    """The last rounds, one a line; the metrics' names are the columns."""
    title = f"the last {last} of {len(rows)} rounds" if len(rows) > last else None
    rows = rows[-last:]
    names = list(dict.fromkeys(metric.name for row in rows for metric in row.metrics))
    table = Table(title=title, box=None, pad_edge=False)
    for name in ("round", "clients", "examples", *names, "up", "down", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        metrics = {metric.name: f"{metric.value:.4f}" for metric in row.metrics}
        table.add_row(
            str(row.round),
            str(len(row.clients)),
            str(row.num_examples),
            *(metrics.get(name, "") for name in names),
            human_bytes(row.bytes_up),
            human_bytes(row.bytes_down),
            f"{row.seconds:.3f}",
        )
    return table


def human_bytes(count: int) -> str:
    """Bytes in the unit that keeps the number short."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
