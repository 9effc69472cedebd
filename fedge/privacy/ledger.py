"""The rules of a site's ledger: `step(books, record) -> books`, and whether a release may be admitted.

    reserved   the most that work may spend is set aside     (Reserve, before any training)
    sending    its first byte may be on the way: it is spent (Sending, at the maximum until it is known better)
    settled    what it spent in fact                         (Commit)
    released   nothing left the site, nothing is spent       (Release, never after Sending)

No file, clock or entropy: `fedge.privacy.lines` writes records as lines, the site's client keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Final, Literal

import numpy as np

from fedge.errors import LocalProtocolError, RefusedError
from fedge.events import OrderId
from fedge.privacy import rdp
from fedge.privacy.config import Protected
from fedge.privacy.mechanism import Mechanism, coarser, merged, scaled
from fedge.privacy.rdp import Curve
from fedge.refusal import Refusal, RefusalCode

KEPT_ENTRIES: Final = 16
"""How many of a run's latest entries that left are remembered by number."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Set aside the most that the work for an order may spend. Entries count from 1."""

    kind: ClassVar[Literal["reserve"]] = "reserve"

    entry: int
    run_id: str
    order: OrderId
    unit: Protected
    mechanism: Mechanism


@dataclass(frozen=True, slots=True)
class Sending:
    """From now on bytes that depend on the data may have left."""

    kind: ClassVar[Literal["sending"]] = "sending"

    entry: int


@dataclass(frozen=True, slots=True)
class Commit:
    """What was spent in fact: the mechanism that was reserved, released at most as often."""

    kind: ClassVar[Literal["commit"]] = "commit"

    entry: int
    mechanism: Mechanism


@dataclass(frozen=True, slots=True)
class Release:
    """Nothing left the site, and nothing will."""

    kind: ClassVar[Literal["release"]] = "release"

    entry: int


@dataclass(frozen=True, slots=True)
class Unprotected:
    """A run without differential privacy took part: for those who saw it no epsilon bounds anything."""

    kind: ClassVar[Literal["unprotected"]] = "unprotected"

    run_id: str


@dataclass(frozen=True, slots=True)
class Trusted:
    """The data set's owner accepted this ledger although its head said otherwise, and why."""

    kind: ClassVar[Literal["trusted"]] = "trusted"

    reason: str


Record = Reserve | Sending | Commit | Release | Unprotected | Trusted


@dataclass(frozen=True, slots=True)
class Account:
    """Releases that were made, equal mechanisms counted together, with the curves of them all.

    Its size is that of the different mechanisms, whatever the number of releases. What it promises is about all
    that the site has, as long as every release was; from the first one that protects single examples, about an
    example. One that changes moves a clipped update by up to twice the clip, so that releases about the site then
    count with twice their sensitivity.
    """

    counts: Mapping[tuple[Protected, Mechanism], int] = field(default_factory=lambda: MappingProxyType({}))
    """By the unit, and the mechanism with a count of 1."""
    of_site: Curve = field(default_factory=lambda: np.zeros(len(rdp.ORDERS)), compare=False, repr=False)
    of_example: Curve = field(default_factory=lambda: np.zeros(len(rdp.ORDERS)), compare=False, repr=False)

    def charged(self, unit: Protected, mechanism: Mechanism) -> Account:
        """The account with this mechanism on top."""
        one = unit, scaled(mechanism, 1)
        counts = {**self.counts, one: self.counts.get(one, 0) + mechanism.count}
        of_site = self.of_site + price(mechanism) if unit == "client" else self.of_site
        return Account(counts, of_site, self.of_example + price(_for_example(unit, mechanism)))

    @property
    def unit(self) -> Protected:
        """Whom its epsilon is about."""
        return "example" if any(unit == "example" for unit, _ in self.counts) else "client"

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """As they count."""
        made = ((unit, scaled(one, count)) for (unit, one), count in self.counts.items())
        if self.unit == "client":
            return tuple(mechanism for _, mechanism in made)
        return merged(_for_example(unit, mechanism) for unit, mechanism in made)

    @property
    def curve(self) -> Curve:
        """Of its mechanisms."""
        return self.of_example if self.unit == "example" else self.of_site

    def epsilon(self, delta: float) -> float:
        """By RDP; infinite where there is no bound.

        Raises:
            ValueError: `delta` is not in (0, 1).
        """
        return rdp.epsilon(self.curve, delta)


@dataclass(frozen=True, slots=True)
class Open:
    """A reservation that is neither settled nor released."""

    run_id: str
    order: OrderId
    unit: Protected
    mechanism: Mechanism
    sending: bool = False


@dataclass(frozen=True, slots=True)
class RunBooks:
    """One run's part: what it spent (at the maximum where it is sending), what it has set aside.

    `releases` is how many entries left; `left` are the numbers of the last ones of them, and `last_turn` is the
    last round of training that one was for.
    """

    spent: Account = field(default_factory=Account)
    outstanding: Account = field(default_factory=Account)
    releases: int = 0
    left: tuple[int, ...] = ()
    last_turn: int = 0
    unprotected: bool = False


@dataclass(frozen=True, slots=True)
class Books:
    """All of a data set's runs. `settled` and `runs` hold what is committed, `open` what is not yet."""

    settled: Account = field(default_factory=Account)
    runs: Mapping[str, RunBooks] = field(default_factory=lambda: MappingProxyType({}))
    open: Mapping[int, Open] = field(default_factory=lambda: MappingProxyType({}))
    next_entry: int = 1
    trusted: bool = False
    """Whether the last record says that the owner accepts the ledger as it is."""

    def spent(self) -> Account:
        """Committed, and at its reserved maximum what is sending without a commit."""
        return _with(self.settled, self.open, sending=True)

    def outstanding(self) -> Account:
        """Reserved, and not yet sending."""
        return _with(Account(), self.open, sending=False)

    def reserved(self) -> Account:
        """Spent, and what is set aside on top."""
        return _with(self.spent(), self.open, sending=False)

    def of_run(self, run_id: str) -> RunBooks:
        """One run's part; of a run that is not in the books, an empty one."""
        run = self.runs.get(run_id, RunBooks())
        own = {number: each for number, each in self.open.items() if each.run_id == run_id}
        return replace(
            run, spent=_with(run.spent, own, sending=True), outstanding=_with(Account(), own, sending=False)
        )

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Runs without differential privacy: whoever saw one of them is bounded by no epsilon."""
        return tuple(run_id for run_id, run in self.runs.items() if run.unprotected)


def _for_example(unit: Protected, mechanism: Mechanism) -> Mechanism:
    return mechanism if unit == "example" else coarser(mechanism, 2.0)


def price(mechanism: Mechanism) -> Curve:
    """Its RDP curve; infinite where the accountant cannot give a number."""
    try:
        with np.errstate(all="ignore"):
            out = rdp.curve(mechanism)
    except (ArithmeticError, ValueError):
        return np.full(len(rdp.ORDERS), math.inf)
    return np.where(np.isnan(out), math.inf, out)


def step(books: Books, record: Record) -> Books:
    """The books after a record.

    **Guarantees.** `spent().epsilon` falls only at a Commit that is less than was reserved; what is sending
    or settled can never be released.

    Raises:
        LocalProtocolError: the record may not follow here. From a file it says that the file is not what
            this program wrote.
    """
    return replace(_step(books, record), trusted=isinstance(record, Trusted))


def _step(books: Books, record: Record) -> Books:
    match record:
        case Reserve(entry, run_id, order, unit, mechanism):
            if entry != books.next_entry:
                raise LocalProtocolError(f"expected entry {books.next_entry} to be reserved, found {entry}")
            opened = {**books.open, entry: Open(run_id, order, unit, mechanism)}
            runs = books.runs if run_id in books.runs else {**books.runs, run_id: RunBooks()}
            return replace(books, open=opened, runs=runs, next_entry=entry + 1)
        case Sending(entry):
            reservation = _open(books, entry, sending=False)
            run = books.runs[reservation.run_id]
            left = (*run.left, entry)[-KEPT_ENTRIES:]
            order = reservation.order
            last_turn = run.last_turn if order.kind == "evaluate" else max(run.last_turn, order.round)
            run = replace(run, releases=run.releases + 1, left=left, last_turn=last_turn)
            return replace(
                books,
                open={**books.open, entry: replace(reservation, sending=True)},
                runs={**books.runs, reservation.run_id: run},
            )
        case Commit(entry, mechanism):
            reservation = _open(books, entry, sending=True)
            most = reservation.mechanism
            if scaled(mechanism, 1) != scaled(most, 1) or mechanism.count > most.count:
                raise LocalProtocolError(f"entry {entry}: expected at most {most}, found {mechanism}")
            run = books.runs[reservation.run_id]
            run = replace(run, spent=run.spent.charged(reservation.unit, mechanism))
            return replace(
                books,
                settled=books.settled.charged(reservation.unit, mechanism),
                open=_without(books.open, entry),
                runs={**books.runs, reservation.run_id: run},
            )
        case Release(entry):
            _open(books, entry, sending=False)
            return replace(books, open=_without(books.open, entry))
        case Unprotected(run_id):
            run = books.runs.get(run_id, RunBooks())
            if run.unprotected:
                raise LocalProtocolError(
                    "expected a run without protection to be recorded once, found it twice"
                )
            return replace(books, runs={**books.runs, run_id: replace(run, unprotected=True)})
        case Trusted():
            return books


def recover(books: Books) -> tuple[Books, tuple[Record, ...]]:
    """What a crash left open is closed: released where nothing was sent, else spent at its maximum."""
    records: list[Record] = []
    for entry, each in sorted(books.open.items()):
        records.append(Commit(entry, each.mechanism) if each.sending else Release(entry))
    for record in records:
        books = step(books, record)
    return books, tuple(records)


def admit(
    books: Books,
    mechanism: Mechanism,
    *,
    unit: Protected,
    delta: float,
    max_epsilon: float,
    run_id: str,
    run_caps: Mapping[float, float] = MappingProxyType({}),
) -> float:
    """The epsilon, at `delta`, of the data set if this too is spent: at most `max_epsilon`.

    What counts is spent and outstanding. `run_caps` bound the run alone: an epsilon for each of some deltas.

    Raises:
        RefusedError: BUDGET_EXHAUSTED, with what was asked, spent and left in words.
        ValueError: a delta is not in (0, 1).
    """
    before = books.reserved()
    after = _within(unit, mechanism, before, delta=delta, cap=max_epsilon, of="the data set")
    own = {number: each for number, each in books.open.items() if each.run_id == run_id}
    before = _with(books.of_run(run_id).spent, own, sending=False)
    for at, cap in run_caps.items():
        _within(unit, mechanism, before, delta=at, cap=cap, of="the run")
    return after


def check_rested(run: RunBooks, order: OrderId, separation: int) -> None:
    """Whether a site's turn is far enough from its last one for the correlated noise of the run's rounds.

    Raises:
        RefusedError: PROTECTION_TOO_WEAK; it is not.
    """
    if order.kind == "evaluate" or run.last_turn in (0, order.round):
        return
    if order.round - run.last_turn < separation:
        raise RefusedError(
            Refusal(
                RefusalCode.PROTECTION_TOO_WEAK,
                f"asked for round {order.round} after round {run.last_turn}; the noise of this run hides a site's "
                f"turns only where they are {separation} rounds apart",
            )
        )


def _within(
    unit: Protected, mechanism: Mechanism, before: Account, *, delta: float, cap: float, of: str
) -> float:
    after = before.charged(unit, mechanism)
    total = after.epsilon(delta)
    if total <= cap:
        return total
    asked, spent = Account().charged(unit, mechanism).epsilon(delta), before.epsilon(delta)
    mixed = len({unit for unit, _ in after.counts}) > 1
    raise RefusedError(
        Refusal(
            RefusalCode.BUDGET_EXHAUSTED,
            f"the privacy budget of {of} does not allow this: asked for epsilon {asked:.4g} at delta {delta:g}, "
            f"spent or reserved {spent:.4g}, cap {cap:.4g}, left {max(0.0, cap - spent):.4g}, and with it "
            f"{total:.4g} would be spent"
            + (
                " (what was released of the whole site counts twice as sensitive beside releases of examples)"
                if mixed
                else ""
            )
            + "; ask for more noise, fewer steps or fewer rounds",
        )
    )


def _open(books: Books, entry: int, *, sending: bool) -> Open:
    reservation = books.open.get(entry)
    if reservation is None or reservation.sending != sending:
        found = (
            "none that is open" if reservation is None else "sending" if reservation.sending else "reserved"
        )
        expected = "sending" if sending else "reserved and not yet sending"
        raise LocalProtocolError(f"entry {entry}: expected it to be {expected}, found it {found}")
    return reservation


def _with(account: Account, entries: Mapping[int, Open], *, sending: bool) -> Account:
    for each in entries.values():
        if each.sending == sending:
            account = account.charged(each.unit, each.mechanism)
    return account


def _without(entries: Mapping[int, Open], entry: int) -> Mapping[int, Open]:
    return {number: each for number, each in entries.items() if number != entry}
