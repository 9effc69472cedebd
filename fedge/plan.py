"""A run in numbers, and who may be asked: what `fedge.federation` goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedge.round import Terms
from fedge.run import RunConfig
from fedge.strategy import WorkKind

Taken = Mapping[str, tuple[int, int]]
"""client -> (in how many rounds its update counted, the last round that it was asked for)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run in numbers. `max_staleness` None: rounds; a number: each update is a step on arrival.

    A client takes part in at most `max_participations` rounds (None: in any number), and after one not in the
    next `separation - 1`: what a site's privacy was paid for, it is not asked for again.
    """

    rounds: int
    kind: WorkKind
    terms: Terms
    seed: int = 0
    attempts: int = 3
    evaluate_every: int = 0
    evaluation_clients: int = 1
    max_staleness: int | None = None
    max_participations: int | None = None
    separation: int = 1

    @classmethod
    def of(cls, run: RunConfig, *, kind: WorkKind, max_staleness: int | None) -> Plan:
        cohort = run.cohort
        terms = Terms(cohort.size, cohort.needed, cohort.over_select, cohort.deadline_s, cohort.wait_s)
        return cls(
            rounds=run.rounds,
            kind=kind,
            terms=terms,
            seed=run.seed,
            attempts=cohort.attempts,
            evaluate_every=run.evaluation_every,
            evaluation_clients=run.evaluation.clients or cohort.size,
            max_staleness=max_staleness,
            max_participations=run.privacy.max_participations,
            separation=run.privacy.separation,
        )

    def evaluates(self, round: int) -> bool:
        """Whether the model that `round` made is evaluated: every so often, and the last one."""
        if not self.evaluate_every:
            return False
        return round == self.rounds or round % self.evaluate_every == 0

    def eligible(self, clients: Iterable[str], taken: Taken, round: int) -> frozenset[str]:
        """Those of `clients` who may be asked for `round`."""
        return frozenset(client for client in clients if self._may_ask(taken.get(client), round))

    def took_part(self, taken: Taken, round: int, *, asked: Iterable[str], counted: Iterable[str]) -> Taken:
        """`taken` after a round; a plan without limits keeps no account."""
        if self.max_participations is None and self.separation == 1:
            return taken
        counted = frozenset(counted)
        after = {client: (taken.get(client, (0, 0))[0] + (client in counted), round) for client in asked}
        return {**taken, **after}

    def _may_ask(self, taken: tuple[int, int] | None, round: int) -> bool:
        if taken is None:
            return True
        count, last = taken
        if self.max_participations is not None and count >= self.max_participations:
            return False
        return last == round or round - last >= self.separation
