"""A run in numbers, and who may be asked: what `fedge.federation` goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedge.cohort import SecureTerms, Terms
from fedge.errors import ConfigError
from fedge.run import RunConfig
from fedge.strategy import WorkKind

Taken = Mapping[str, tuple[int, int]]
"""client -> (in how many rounds its update counted, the last round that it was asked for)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run in numbers. `max_staleness` None: rounds; a number: each update is a step on arrival.

    A client takes part in at most `max_participations` rounds (None: in any number), and after one not in the
    next `separation - 1`: what a site's privacy was paid for, it is not asked for again. Where so much is limited,
    those with the fewest turns are asked first, so that nobody's turns are left over when they are needed.
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
    def of(
        cls, run: RunConfig, *, kind: WorkKind, max_staleness: int | None, secure: SecureTerms | None = None
    ) -> Plan:
        cohort = run.cohort
        terms = Terms(
            cohort.size, cohort.needed, cohort.over_select, cohort.deadline_s, cohort.wait_s, secure
        )
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

    @property
    def fewest_clients(self) -> int:
        """With fewer the run cannot come to its end, even if nobody ever fails. They are enough where every
        round asks for `size` clients, and needs them."""
        needed, asked = (self.terms.fewest, self.terms.asked) if self.max_staleness is None else (1, 1)
        beside_the_resting = (min(self.separation, self.rounds) - 1) * asked + needed
        turns = self.max_participations or self.rounds
        return max(beside_the_resting, -(-self.rounds * needed // turns))

    def check_population(self, clients: int) -> None:
        """Whether so many clients are enough for the whole run.

        Raises:
            ConfigError: they are not.
        """
        if clients >= self.fewest_clients:
            return
        limits = [f"at most {self.max_participations} rounds for each"] if self.max_participations else []
        limits += [f"{self.separation} rounds from one turn to the next"] if self.separation > 1 else []
        raise ConfigError(
            f"expected at least {self.fewest_clients} clients for {self.rounds} rounds of {self.terms.size} with "
            f"{' and '.join(limits) or 'no limits'}, found {clients}: have more clients, or change cohort.size, "
            "privacy.max_participations or privacy.separation"
        )

    def turns(self, taken: Taken) -> dict[str, int]:
        """How often each client has taken part; empty where that is not limited."""
        return {client: count for client, (count, _) in taken.items() if count}

    def evaluates(self, round: int) -> bool:
        """Whether the model that `round` made is evaluated: every so often, and the last one."""
        if not self.evaluate_every:
            return False
        return round == self.rounds or round % self.evaluate_every == 0

    def eligible(self, clients: Iterable[str], taken: Taken, round: int) -> frozenset[str]:
        """Those of `clients` who may be asked for `round`."""
        if not taken:
            return frozenset(clients)
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
