"""A run's state, and the words between its machine and its driver that are not those of a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedge.cohort import Round
from fedge.events import Close, Effect, Event, OrderId
from fedge.plan import Plan, Taken

Status = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Stop:
    """Event: the run's owner wants it to end."""


@dataclass(frozen=True, slots=True)
class Returned:
    """Event: a client that counted as present while its driver started again is here indeed."""

    client: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Effect: the run is over; `reason` is empty if every round is done."""

    status: Status
    reason: str = ""


RunEvent = Event | Stop | Returned
RunEffect = Effect | Finish


@dataclass(frozen=True, slots=True)
class Federation:
    """A run's state. `committed` rounds are done; `training` and `evaluation` are the open ones.

    `at_work` is used by runs without rounds: who is computing on the model of which round; `resting`
    are those that failed and are asked again after the next step.
    Of such a run, `moving` says that somebody has made progress since its timer was started, `extensions`
    how often it went on for that, and `missed` how often in a row nothing came: no update in time, or
    failures alone.
    `owed` is a round whose evaluation was due while another was under way: as soon as that is over, the
    model of that moment is evaluated. `taken` is who took part when, where the plan limits it; `exhausted`
    are those that have said, since they came, that their privacy budget allows no more. `barred` are left out of the
    next attempts at the open round, for what they did in an earlier one.
    """

    plan: Plan
    status: Status = "running"
    committed: int = 0
    clients: frozenset[str] = frozenset()
    training: Round | None = None
    evaluation: Round | None = None
    previous: Round | None = None
    at_work: frozenset[tuple[str, int]] = frozenset()
    resting: frozenset[str] = frozenset()
    moving: bool = False
    extensions: int = 0
    missed: int = 0
    owed: int = 0
    exhausted: frozenset[str] = frozenset()
    barred: frozenset[str] = frozenset()
    reason: str = ""
    taken: Taken = field(default_factory=dict)

    @property
    def waiting_for(self) -> str:
        """Why nothing moves, in words; empty while something does."""
        if self.status != "running":
            return self.reason
        if self.training is not None and self.training.phase == "waiting":
            ready = f"{self.training.present} of {self.training.terms.fewest} are ready"
            return f"waiting for clients: {ready}{self.spent_turns}"
        if self.plan.max_staleness is not None and not self.at_work and not self.evaluation:
            return f"waiting for clients: none is at work{self.spent_turns}"
        return ""

    @property
    def spent_turns(self) -> str:
        """How many are here and may not be asked, to be added to a sentence; empty if none."""
        may = self.eligible(self.clients)
        if may == self.clients:
            return ""
        return (
            f"; {len(self.clients - may)} of the {len(self.clients)} that are here may not be asked now: they have "
            "spent their budget, had their turns (privacy.max_participations), or rest (privacy.separation)"
        )

    def eligible(self, clients: Collection[str]) -> frozenset[str]:
        """Those of `clients` that may be asked for the next round: their privacy allows it, as far as is known."""
        willing = frozenset(clients) - self.exhausted - self.barred
        return self.plan.eligible(willing, self.taken, self.committed + 1)

    @property
    def cohorts(self) -> dict[OrderId, dict[str, str]]:
        """Each open order's cohort: client -> pending, accepted, lost or failed."""
        cohorts = {
            round.order: round.cohort
            for round in (self.training, self.evaluation)
            if round is not None and round.is_open
        }
        for client, at in sorted(self.at_work):
            cohorts.setdefault(OrderId(self.plan.kind, at), {})[client] = "pending"
        return cohorts


def still_open(run: Federation, effects: Sequence[RunEffect]) -> frozenset[OrderId]:
    """The orders whose accepted updates still count: those that are open, and those that these effects close."""
    rounds = (round.order for round in (run.training, run.evaluation) if round is not None)
    return frozenset([*rounds, *(effect.order for effect in effects if isinstance(effect, Close))])


RunStep = tuple[Federation, tuple[RunEffect, ...]]
