"""What a ledger says, for people and for programs; and its numbers recomputed from its raw records."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedge.errors import ConfigError, RefusedError
from fedge.privacy import ledger, rdp
from fedge.privacy.config import Protected
from fedge.privacy.ledger import Account, Books
from fedge.privacy.lines import Line
from fedge.privacy.mechanism import Mechanism, Skellam, merged
from fedge.privacy.pld import reference_rdp, statement
from fedge.refusal import Refusal, RefusalCode
from fedge_client.ledger_file import read_only
from fedge_client.settings import ClientSettings

TOLERANCE = 1e-3

_WHOM: dict[Protected | None, str] = {"example": "an example", "client": "the site", None: ""}


@dataclass(frozen=True, slots=True)
class Spent:
    """A run's, or the data set's. `epsilon` is by RDP; `stated` by the tighter accountant, if it is installed.

    `protects` is whom they are about: one example, all that the site has, or nobody yet (None).
    """

    name: str
    protects: Protected | None
    releases: tuple[str, ...]
    epsilon: float
    stated: float | None
    unprotected: bool


@dataclass(frozen=True, slots=True)
class Report:
    """A data set's ledger under its owner's cap; `outstanding` is set aside for work that is under way."""

    dataset: str
    records: int
    runs: tuple[Spent, ...]
    total: Spent
    outstanding: float
    cap: float
    left: float
    delta: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(settings: ClientSettings, folder: Path) -> Report:
    """Read a site's ledger; `folder` is that of its client.toml.

    Raises:
        RefusedError: LEDGER_UNUSABLE.
    """
    chain = _read(settings, folder, [])
    books, policy = chain.books, settings.policy
    spent = books.spent()
    whole = books.reserved().epsilon(policy.delta)
    runs = tuple(_run(books, run_id, policy.delta) for run_id in books.runs)
    return Report(
        dataset=settings.ledger.dataset,
        records=max(0, chain.head[0]),
        runs=runs,
        total=_spent("all runs", spent, policy.delta, unprotected=bool(books.unprotected)),
        outstanding=books.outstanding().epsilon(policy.delta),
        cap=policy.max_epsilon,
        left=max(0.0, policy.max_epsilon - whole),
        delta=policy.delta,
    )


def verify(settings: ClientSettings, folder: Path) -> int:
    """Read every record, and compare each epsilon that was stored with one of another accountant; how many.

    Raises:
        RefusedError: LEDGER_UNUSABLE; the chain is broken, or a number is not what its records give.
        ConfigError: dp-accounting is not installed.
    """
    lines: list[Line] = []
    _read(settings, folder, lines)
    books, checked, known = Books(), 0, {}
    for line in lines:
        books = ledger.step(books, line.record)
        spent = books.spent()
        key = (tuple(sorted(map(str, spent.mechanisms))), line.delta)
        if key not in known:
            known[key] = independent(spent.mechanisms, line.delta)
        stored = math.inf if line.epsilon is None else line.epsilon
        if not (stored == known[key] or abs(stored - known[key]) <= TOLERANCE):
            raise RefusedError(
                Refusal(
                    RefusalCode.LEDGER_UNUSABLE,
                    f"record {line.seq}: expected epsilon {known[key]:.6g}, as the records give it, found "
                    f"{stored:.6g}",
                )
            )
        checked += 1
    return checked


def independent(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The RDP epsilon by dp-accounting; where it has no event (Skellam) or no bound, by our own curves."""
    releases = merged(mechanisms)
    own = rdp.epsilon(sum((ledger.price(each) for each in releases), np.zeros(len(rdp.ORDERS))), delta)
    if not releases or any(isinstance(each, Skellam) for each in releases) or not math.isfinite(own):
        return own
    return reference_rdp(releases, delta)


def _read(settings: ClientSettings, folder: Path, lines: list[Line]) -> Any:
    return read_only(
        folder / settings.ledger.path,
        settings.ledger.dataset,
        head_folder=folder / settings.identity,
        visit=lines.append,
    )


def _run(books: Books, run_id: str, delta: float) -> Spent:
    run = books.of_run(run_id)
    return _spent(run_id, run.spent, delta, unprotected=run.unprotected)


def _spent(name: str, account: Account, delta: float, *, unprotected: bool) -> Spent:
    stated: float | None = None
    epsilon = account.epsilon(delta)
    if account.mechanisms and math.isfinite(epsilon):
        try:
            stated = statement(account.mechanisms, delta)[0]
        except ConfigError:  # dp-accounting is not installed: RDP is a valid bound, only a wider one
            stated = None
    protects = account.unit if account.mechanisms else None
    return Spent(name, protects, tuple(map(str, account.mechanisms)), epsilon, stated, unprotected)


def print_report(console: Console, found: Report) -> None:
    """The report as a table and a few lines."""
    table = Table(title=f"data set {found.dataset}: {found.records} records", box=None, pad_edge=False)
    for name in ("run", "protects", "releases", "epsilon", "epsilon (RDP)"):
        table.add_column(name, justify="right" if name.startswith("epsilon") else "left")
    for run in (*found.runs, found.total):
        stated = "" if run.stated is None else f"{run.stated:.4g}"
        releases = "\n".join(run.releases) or ("without protection" if run.unprotected else "none")
        table.add_row(escape(run.name), _WHOM[run.protects], releases, stated, f"{run.epsilon:.4g}")
    console.print(table)
    console.print(
        f"spent {found.total.epsilon:.4g} of {found.cap:g} at delta {found.delta:g}, set aside for work under way "
        f"{found.outstanding:.4g}, left {found.left:.4g}",
        highlight=False,
    )
    open_runs = sum(run.unprotected for run in found.runs)
    if open_runs:
        console.print(
            f"{open_runs} runs had no differential privacy: for whoever saw them, no epsilon bounds anything",
            style="yellow",
        )
