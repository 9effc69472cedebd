"""What a ledger says, for people and for programs; and its numbers recomputed from its raw records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table

from fedge.errors import ConfigError, RefusedError
from fedge.privacy import ledger, rdp
from fedge.privacy.config import Protected
from fedge.privacy.ledger import Account, Books
from fedge.privacy.lines import Line
from fedge.privacy.mechanism import Mechanism, Skellam, merged
from fedge.privacy.pld import reference_rdp, statement
from fedge.refusal import Refusal, RefusalCode
from fedge_client.ledger import accept_head
from fedge_client.ledger_file import HEADS, Chain, Paths, read_chain, read_only
from fedge_client.settings import ClientSettings, Policy

TOLERANCE = 1e-3

_WHOM: dict[Protected | None, str] = {"example": "an example", "client": "the site", None: ""}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a data set's ledger is, and its owner's cap. `delta` None: that with which it was written last."""

    folder: Path
    dataset: str
    head_folder: Path
    delta: float | None = None
    cap: float | None = None

    @classmethod
    def of(cls, settings: ClientSettings, folder: Path) -> Self:
        """A site's; `folder` is that of its client.toml."""
        kept, policy = settings.ledger, settings.policy
        return cls(
            folder / kept.path, kept.dataset, folder / settings.identity, policy.delta, policy.max_epsilon
        )

    @classmethod
    def each_in(cls, folder: Path, dataset: str | None = None) -> list[Self]:
        """Those in a folder that has their heads, too: what a Flower client keeps. Of one data set, if that is given.

        Raises:
            ConfigError: there are none.
        """
        # A head without a ledger is of one that was deleted.
        names = sorted({path.stem for path in (*folder.glob("*.ledger"), *(folder / HEADS).glob("*.head"))})
        found = [name for name in names if dataset in (None, name)]
        if not found:
            there = f"those of {', '.join(names[:8])}" if names else "none"
            raise ConfigError(f"{folder}: expected the ledger of {dataset or 'a data set'}, found {there}")
        return [cls(folder, name, folder / HEADS) for name in found]

    def read(self, visit: Callable[[Line], None]) -> Chain:
        """
        Raises:
            RefusedError: LEDGER_UNUSABLE.
        """
        return read_only(self.folder, self.dataset, head_folder=self.head_folder, visit=visit)


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
    """A data set's ledger under its owner's cap, where that is known; `outstanding` is set aside for work that is under
    way."""

    dataset: str
    records: int
    runs: tuple[Spent, ...]
    total: Spent
    outstanding: float
    cap: float | None
    left: float | None
    delta: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(place: Place) -> Report:
    """Read a data set's ledger.

    Raises:
        RefusedError: LEDGER_UNUSABLE.
    """
    deltas = [Policy().delta]
    chain = place.read(lambda line: deltas.append(line.delta))
    books, delta = chain.books, place.delta or deltas[-1]
    whole = books.reserved().epsilon(delta)
    return Report(
        dataset=place.dataset,
        records=max(0, chain.head[0]),
        runs=tuple(_run(books, run_id, delta) for run_id in books.runs),
        total=_spent("all runs", books.spent(), delta, unprotected=bool(books.unprotected)),
        outstanding=books.outstanding().epsilon(delta),
        cap=place.cap,
        left=max(0.0, place.cap - whole) if place.cap is not None else None,
        delta=delta,
    )


def accept(place: Place, *, reason: str) -> bool:
    """Accept a ledger as it is, see `fedge_client.ledger.accept_head`; False if it was accepted already.

    Raises:
        RefusedError: LEDGER_UNUSABLE: nobody can.
    """
    delta = place.delta or _last_delta(place)
    return accept_head(place.folder, place.dataset, delta, head_folder=place.head_folder, reason=reason)


def _last_delta(place: Place) -> float:
    """That of the last record, whatever a head says."""
    deltas, path = [Policy().delta], Paths.of(place.folder, place.dataset, place.head_folder).ledger
    if not path.exists():
        return deltas[-1]
    with path.open("rb") as file:
        read_chain(file, path, head=None, visit=lambda line: deltas.append(line.delta))
    return deltas[-1]


def verify(place: Place) -> int:
    """Read every record, and compare each epsilon that was stored with one of another accountant; how many.

    Raises:
        RefusedError: LEDGER_UNUSABLE; the chain is broken, or a number is not what its records give.
        ConfigError: dp-accounting is not installed.
    """
    lines: list[Line] = []
    place.read(lines.append)
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
        table.add_row(run.name, _WHOM[run.protects], releases, stated, f"{run.epsilon:.4g}")
    console.print(table)
    of, left = "", ""
    if found.cap is not None and found.left is not None:
        of, left = f" of {found.cap:g}", f", left {found.left:.4g}"
    console.print(
        f"spent {found.total.epsilon:.4g}{of} at delta {found.delta:g}, set aside for work under way "
        f"{found.outstanding:.4g}{left}",
    )
    open_runs = sum(run.unprotected for run in found.runs)
    if open_runs:
        console.print(
            f"{open_runs} runs had no differential privacy: for whoever saw them, no epsilon bounds anything",
            style="yellow",
        )
