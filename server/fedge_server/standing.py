"""How a run stands, as operators are told: how far it is, who is at work, and who is missing.

Pure: the coordinator's state goes in, messages come out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from fedge.cohort import Round
from fedge.history import Row
from fedge.run_state import Federation
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_metrics, shorten
from fedge_server.driver import RunDriver
from fedge_server.past import PastRun

_NAMED: Final = 8


@dataclass(frozen=True, slots=True)
class Site:
    """An enrolled site that is not revoked, as far as runs are concerned."""

    name: str
    connected: bool


def summary_of(run: RunDriver | PastRun, sites: Collection[Site] = ()) -> pb.RunSummary:
    """A run in short. `sites` are all that could take part: with them, a run that waits says who is missing."""
    machine = run.machine
    status = machine.status if run.over else "running"  # it has ended once that is kept
    waits = status == "running" and bool(run.waiting_for)
    return pb.RunSummary(
        run_id=run.run_id,
        name=run.config.name,
        status="waiting" if waits else status,
        round=machine.committed,
        rounds=run.config.rounds,
        reason=_reason(run, sites if waits else ()),
        strategy=run.record.strategy,
        submitted_at=run.record.submitted_at,
        progress=progress_of(machine) if status == "running" else "",
    )


def progress_of(machine: Federation) -> str:
    """What the open rounds are waiting for, in words; empty if none is open."""
    parts = [
        _round_in_words(round)
        for round in (machine.training, machine.evaluation)
        if round is not None and round.is_open
    ]
    if machine.at_work:
        workers = {client: 0 for client, _ in sorted(machine.at_work)}
        parts.append(f"round {machine.committed + 1}: at work are {_named(workers)}")
    return "; ".join(parts)


def clients_of(run: RunDriver | PastRun) -> list[pb.RunClient]:
    """Every site this run knows of: who is ready, at work or gone, and why any of them last said no."""
    refusals, ready = run.history.refusals, run.machine.clients
    took_part = {name for row in run.history.rows for name in row.clients}
    working = _working(run.machine)
    clients = []
    for name in sorted({*ready, *refusals, *took_part}):
        refusal = refusals.get(name)
        state = "ready" if name in ready else "refused" if refusal is not None else "gone"
        detail = shorten(str(refusal)) if refusal is not None else ""
        if name in working and name in ready:
            state, detail = "working", working[name]
        clients.append(pb.RunClient(name=name, state=state, detail=detail))
    return clients


def row_of(row: Row) -> pb.HistoryRow:
    return pb.HistoryRow(
        round=row.round,
        attempt=row.attempt,
        clients=row.clients,
        num_examples=row.num_examples,
        metrics=encode_metrics(row.metrics),
        seconds=row.seconds,
        bytes_down=row.bytes_down,
        bytes_up=row.bytes_up,
        refused=row.refused,
        staleness=row.staleness,
    )


def _working(machine: Federation) -> dict[str, str]:
    """Who is at work, and on what."""
    working = {client: f"on the model of round {at}" for client, at in machine.at_work}
    for round in (machine.training, machine.evaluation):
        if round is not None and round.is_open:
            progress = dict(round.progress)
            for client in round.at_work:
                working[client] = f"{round.order}{_percent(progress.get(client, 0))}"
    return working


def _round_in_words(round: Round) -> str:
    progress = dict(round.progress)
    text = f"{round.order}: {len(round.accepted)} of {round.terms.size} updates are in"
    if round.pending:
        text += f"; at work: {_named({name: progress.get(name, 0) for name in sorted(round.pending)})}"
    if round.stalled:
        text += f"; without progress: {_named(dict.fromkeys(sorted(round.stalled), 0))}"
    gone = round.lost - round.stalled
    if gone:
        text += f"; gone: {_named(dict.fromkeys(sorted(gone), 0))}"
    return text


def _named(progress: Mapping[str, int]) -> str:
    """The first few by name, and how many more there are."""
    names = [f"{name}{_percent(permille)}" for name, permille in list(progress.items())[:_NAMED]]
    more = len(progress) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _percent(permille: int) -> str:
    return f" ({permille // 10} %)" if permille else ""


def _reason(run: RunDriver | PastRun, sites: Collection[Site]) -> str:
    """Why a run waits or ended, who is missing, and if sites refused it, how many and the first one's words."""
    reason, refusals = run.waiting_for, run.history.refusals
    if not reason:
        return reason
    away = [site.name for site in sites if not site.connected]
    silent = [
        site.name
        for site in sites
        if site.connected and site.name not in run.machine.clients and site.name not in refusals
    ]
    if away:
        reason += f"; not connected: {_named(dict.fromkeys(away, 0))}"
    if silent:
        reason += f"; connected, but not ready: {_named(dict.fromkeys(silent, 0))}"
    if refusals:
        site, refusal = min(refusals.items())
        reason += f"; {len(refusals)} refused, {site}: {refusal}"
    return shorten(reason)
