"""Any history of work, retries, crashes and restarts: what left is counted, and by the number of another accountant."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedge.errors import RefusedError
from fedge.events import OrderId
from fedge.faults import LEDGER_POINTS, Faults
from fedge.privacy.config import Protected
from fedge.privacy.mechanism import Gaussian, Mechanism, SampledGaussian, from_table, scaled
from fedge.privacy.pld import reference_rdp
from fedge.refusal import RefusalCode
from fedge_client.ledger import Ledger

DELTA, CAP = 1e-5, 20.0
MECHANISMS: tuple[Mechanism, ...] = (
    SampledGaussian(1.0, 0.1, 5),
    SampledGaussian(0.7, 0.02, 12),
    Gaussian(4.0),
    Gaussian(30.0, 3),
)

Made = tuple[Protected, Mechanism]
MADE: tuple[Made, ...] = (
    *(("example", each) for each in MECHANISMS),
    ("client", MECHANISMS[2]),
    ("client", Gaussian(12.0)),
)

reference = lru_cache(maxsize=None)(reference_rdp)


class CrashError(Exception):
    """The process ends here."""


class Crashes(Faults):
    """Ends the work at the next moment of that name, if one is set."""

    at = ""

    def reach(self, point: str) -> None:
        if point == self.at:
            self.at = ""
            raise CrashError(point)


class Site(RuleBasedStateMachine):
    """A ledger, and what the test knows has left: for each entry the least and the most that it may count for."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.faults = Crashes()
        self.reserved: dict[int, Made] = {}
        self.sent: dict[int, Made] = {}
        self.least: Counter[Made] = Counter()
        self.most: Counter[Made] = Counter()
        self.round = 0

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self) -> None:
        self.open()

    def open(self) -> None:
        self.ledger = Ledger.open(self.folder / "ledger", "data", DELTA, self.faults, head_folder=self.folder)
        # What was only reserved is given back; what was sending is spent at its maximum.
        self.reserved.clear()
        for unit, mechanism in self.sent.values():
            self.count(unit, mechanism)
        self.sent.clear()

    def count(self, unit: Protected, mechanism: Mechanism, *, at_least: int | None = None) -> None:
        one = unit, scaled(mechanism, 1)
        self.least[one] += mechanism.count if at_least is None else at_least
        self.most[one] += mechanism.count

    @contextmanager
    def mortal(self, point: str | None):
        """A call that may be cut off; then everything in memory is gone, and the next process reads the file."""
        self.faults.at = point or ""
        try:
            yield
        except CrashError:
            self.ledger.close()
            self.crashed = True
        else:
            self.crashed = False
        self.faults.at = ""

    @rule(made=st.sampled_from(MADE), point=st.none() | st.sampled_from(LEDGER_POINTS))
    def reserve(self, made: Made, point: str | None) -> None:
        unit, mechanism = made
        self.round += 1
        entry = 0
        with self.mortal(point):
            try:
                entry = self.ledger.reserve(
                    "run", OrderId("train", self.round), mechanism, unit=unit, max_epsilon=CAP
                )
            except RefusedError as error:
                if error.refusal.code != RefusalCode.BUDGET_EXHAUSTED:
                    raise
                return
        if self.crashed:
            self.open()
        else:
            self.reserved[entry] = made

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), point=st.none() | st.sampled_from(LEDGER_POINTS))
    def send(self, data: st.DataObject, point: str | None) -> None:
        entry = data.draw(st.sampled_from(sorted(self.reserved)))
        made = self.reserved.pop(entry)
        with self.mortal(point):
            self.ledger.sending(entry)
        if self.crashed:  # nothing left, for the call did not return; but it may be on disk that it would
            self.count(*made, at_least=0)
            self.open()
        else:
            self.sent[entry] = made

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), point=st.none() | st.sampled_from(LEDGER_POINTS))
    def commit(self, data: st.DataObject, point: str | None) -> None:
        entry = data.draw(st.sampled_from(sorted(self.sent)))
        unit, mechanism = self.sent.pop(entry)
        done = scaled(mechanism, data.draw(st.integers(1, mechanism.count)))
        with self.mortal(point):
            self.ledger.commit(entry, done)
        if self.crashed:
            self.count(unit, mechanism, at_least=done.count)
            self.open()
        else:
            self.count(unit, done)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), point=st.none() | st.sampled_from(LEDGER_POINTS))
    def give_back(self, data: st.DataObject, point: str | None) -> None:
        entry = data.draw(st.sampled_from(sorted(self.reserved)))
        del self.reserved[entry]
        with self.mortal(point):
            self.ledger.release(entry)
        if self.crashed:
            self.open()

    @rule(point=st.none() | st.sampled_from(LEDGER_POINTS))
    def restart(self, point: str | None) -> None:
        """The next process may die, too, while it closes what this one has left open."""
        self.ledger.close()
        with self.mortal(point):
            self.open()
        if self.crashed:
            self.open()

    @invariant()
    def nothing_that_left_is_forgotten_and_little_more_is_counted(self) -> None:
        if not hasattr(self, "ledger"):
            return
        found = Counter(self.ledger.books.spent().counts)
        for unit, mechanism in self.sent.values():
            found[unit, scaled(mechanism, 1)] -= mechanism.count
        for one in ((unit, scaled(each, 1)) for unit, each in MADE):
            assert self.least[one] <= found[one] <= self.most[one]

    @invariant()
    def epsilon_is_that_of_the_raw_records_by_another_accountant(self) -> None:
        if not hasattr(self, "ledger"):
            return
        expected = reference(raw(self.folder / "ledger" / "data.ledger"), DELTA)
        assert self.ledger.books.spent().epsilon(DELTA) == pytest.approx(expected, abs=1e-3)
        assert expected <= CAP + 1e-3


def raw(path: Path) -> tuple[Mechanism, ...]:
    """What the lines of a ledger say was spent, read without any of its own code."""
    entries: dict[int, dict[str, object]] = {}
    spent: dict[int, dict[str, object]] = {}
    units: dict[int, str] = {}
    for line in path.read_text().splitlines()[1:]:
        record = json.loads(line)
        match record["kind"]:
            case "reserve":
                entries[record["entry"]] = record["mechanism"]
                units[record["entry"]] = record["unit"]
            case "sending":
                spent[record["entry"]] = entries[record["entry"]]
            case "commit":
                spent[record["entry"]] = record["mechanism"]
    counts: Counter[Mechanism] = Counter()
    of_examples = "example" in {units[entry] for entry in spent}
    for entry, table in spent.items():
        mechanism = from_table(table)
        if of_examples and units[entry] == "client":
            assert isinstance(mechanism, Gaussian)
            # Twice the sensitivity: for what of a site a clip bounds, one other example can be all the way across.
            mechanism = Gaussian(mechanism.noise_multiplier / 2, mechanism.count)
        counts[scaled(mechanism, 1)] += mechanism.count
    return tuple(scaled(one, count) for one, count in sorted(counts.items(), key=str))


TestSite = Site.TestCase
TestSite.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
