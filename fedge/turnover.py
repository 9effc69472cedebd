"""Many clients that come and go while an open round has all whom it wants: noted one by one, and told at once.

For whoever drives a large population: a step of the machine copies its sets, which costs as much as the population is
large, for a client that nothing is asked of.
"""

from __future__ import annotations

from dataclasses import replace

from fedge.cohort import Round
from fedge.events import Joined, Left
from fedge.run_state import Federation


class Turnover:
    """Events that change nothing but who is there.

    **Guarantees.** `applied` is what `federation.step` makes of the events that were taken, one after another, and it
    would have had no effect for any of them.
    """

    def __init__(self, *, noted: bool = True) -> None:
        """Where something else hears of each event, too, none is to be `noted`."""
        self._noted = noted
        self._events: list[Joined | Left] = []
        self._run: Federation | None = None
        self._quiet: _Quiet | None = None

    def take(self, run: Federation, event: object) -> bool:
        """Whether an event was taken; if not, it is for `step`, behind those that were. `run` is the state before all
        of them."""
        if not self._noted or not isinstance(event, Joined | Left):
            return False
        if run is not self._run:
            self._run, self._quiet = run, _Quiet.of(run, self._quiet)
        if self._quiet is None or event.client in self._quiet.asked:
            return False
        self._events.append(event)
        return True

    def applied(self, run: Federation) -> Federation:
        """The state after the events that were taken since the last time; `run` is the one before."""
        events, self._events = self._events, []
        if not events:
            return run
        assert self._quiet is not None  # else none were taken
        return self._quiet.after(run, events)


class _Quiet:
    """An open round that asks nobody else, whoever comes or goes but those in `asked`."""

    def __init__(self, round: Round, before: _Quiet | None) -> None:
        self.round = round
        self.asked = frozenset(round.candidates[: round.cursor])
        same = before is not None and before.round.candidates is round.candidates
        self._candidates: set[str] = (
            before._candidates if before is not None and same else set(round.candidates)
        )

    @classmethod
    def of(cls, run: Federation, before: _Quiet | None) -> _Quiet | None:
        """That of a run which has no other; None if there is none."""
        rounds = [round for round in (run.training, run.evaluation) if round is not None]
        if run.status != "running" or run.plan.max_staleness is not None or len(rounds) != 1:
            return None
        if run.evaluation is not None and run.evaluation.order.round < run.committed:
            return None
        (round,) = rounds
        at_work = len(round.pending) + len(round.accepted)
        wants_nobody = round.phase == "open" and round.terms.secure is None and round.terms.asked <= at_work
        if not wants_nobody or len(round.accepted) >= round.terms.size:
            return None
        return cls(round, before)

    def after(self, run: Federation, events: list[Joined | Left]) -> Federation:
        round = self.round
        clients, exhausted, away = set(run.clients), set(run.exhausted), set(round.away)
        new: list[str] = []
        for event in events:
            client = event.client
            if isinstance(event, Left):
                clients.discard(client)
                if client in self._candidates:
                    away.add(client)
                continue
            clients.add(client)
            exhausted.discard(client)
            if self.round is run.training and not _may_train(run, client):
                continue
            if client not in self._candidates:
                self._candidates.add(client)
                new.append(client)
            away.discard(client)
        round = replace(
            round, candidates=(*round.candidates, *new) if new else round.candidates, away=frozenset(away)
        )
        self.round = round
        run = replace(run, clients=frozenset(clients), exhausted=frozenset(exhausted))
        return replace(run, training=round) if run.training is not None else replace(run, evaluation=round)


def _may_train(run: Federation, client: str) -> bool:
    """Whether one that has just come may be asked."""
    return bool(
        run.plan.eligible((client,), run.taken, run.committed + 1)
    )  # nobody is barred but from secure sums
