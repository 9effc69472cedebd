"""What privacy costs the simulated clients: each has an account, as each deployed site has a ledger."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from fedge.errors import ConfigError, RefusedError, TaskError
from fedge.privacy.config import Unit
from fedge.privacy.example import ExampleLevel
from fedge.privacy.mechanism import Mechanism, Skellam, merged, scaled
from fedge.privacy.pld import statement
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.terms import Price, Terms, price
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.strategy import WorkKind

_EXHAUSTED = Refusal(RefusalCode.BUDGET_EXHAUSTED, "this client's privacy budget does not allow this")


@dataclass(frozen=True, slots=True)
class Spent:
    """The privacy of a finished simulation: the epsilon of every client that took part, at `delta`.

    `epsilons` are by RDP, as a site's gate counts; `epsilon` is the largest of them by the accountant named,
    as it is stated to people.
    """

    unit: Unit = "none"
    delta: float | None = None
    epsilon: float | None = None
    accountant: str = ""
    epsilons: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """In words, for people; empty where nothing was protected."""
        if self.epsilon is None or self.delta is None:
            return ""
        whose = "an example of a client" if self.unit == "example" else "a client"
        return f"epsilon {self.epsilon:.4g} at delta {self.delta:g} for {whose} ({self.accountant})"

    def as_dict(self) -> dict[str, Any]:
        """For summaries: the spread, and not every client."""
        if self.unit == "none":
            return {"unit": self.unit}
        spread = sorted(self.epsilons.values())
        return {
            "unit": self.unit,
            "delta": self.delta,
            "epsilon": self.epsilon,
            "accountant": self.accountant,
            "clients": len(spread),
            "epsilon_median_rdp": statistics.median(spread) if spread else 0.0,
            "epsilon_max_rdp": spread[-1] if spread else 0.0,
        }


class _Made(NamedTuple):
    """A client's account: its training examples, and how many orders and evaluations it has paid for."""

    size: int
    orders: int = 0
    evaluations: int = 0

    def ordered(self) -> _Made:
        return _Made(self.size, self.orders + 1, self.evaluations)

    def evaluated(self) -> _Made:
        return _Made(self.size, self.orders, self.evaluations + 1)


class Accounts:
    """Prices and counts what the clients do. Without privacy it has nothing to do."""

    def __init__(self, run: RunConfig, kind: WorkKind, summed: Skellam | None = None) -> None:
        """`summed` is what an order costs where the members of a secure sum add the noise."""
        self._summed = summed
        self.terms = Terms.of(run)
        self._run = run
        self._kind: Literal["train", "gradient"] = "gradient" if kind == "gradient" else "train"
        self._made: dict[str, _Made] = {}
        self._fresh: set[_Made] = set()
        self._worst = 0.0
        self._prices: dict[int, Price] = {}

    def price(self, size: int) -> Price:
        """The run at a client of `size` training examples.

        Raises:
            ConfigError: no noise keeps the run's terms there.
        """
        assert self.terms is not None  # asked only under terms
        if size not in self._prices:
            try:
                self._prices[size] = price(self.terms, self._run.work, self._kind, size, summed=self._summed)
            except ValueError as error:
                raise ConfigError(f"run {self._run.name!r} at a client of {size} examples: {error}") from None
        return self._prices[size]

    def level(self, size: int) -> ExampleLevel | None:
        """What a client of `size` examples does to gradients and evaluations; None if nothing."""
        if self.terms is None or self.terms.unit != "example":
            return None
        return ExampleLevel(
            self.terms.clip,
            self.price(size).noise_multiplier,
            self.terms.evaluation_noise_multiplier,
            self.terms.loss_bound,
        )

    def charge(self, client: str, kind: WorkKind, size: int) -> None:
        """A client does an order; more of them than the run has paid for are refused.

        Raises:
            RefusedError: the client's budget is exhausted.
            TaskError: its data has changed its size.
        """
        if self.terms is None:
            return
        size = size if self.terms.unit == "example" else 1  # a client as a whole costs the same
        found = self.price(size)
        cost = found.evaluation if kind == "evaluate" else found.order
        limit = self.terms.evaluations if kind == "evaluate" else self.terms.participations
        made = self._made.get(client, _Made(size))
        if made.size != size:
            raise TaskError(f"expected {client} to keep its {made.size} training examples, found {size}")
        if cost is None or (made.evaluations if kind == "evaluate" else made.orders) >= limit:
            raise RefusedError(_EXHAUSTED)
        made = made.evaluated() if kind == "evaluate" else made.ordered()
        self._made[client] = made
        self._fresh.add(made)

    def worst(self) -> float | None:
        """What the client that has spent the most has spent by now, by RDP; None without privacy."""
        if self.terms is None:
            return None
        self._worst = max((self._worst, *map(self._epsilon, self._fresh)))  # nobody gets anything back
        self._fresh.clear()
        return self._worst

    def spent(self) -> Spent:
        """What it came to."""
        if self.terms is None:
            return Spent()
        delta = self.terms.delta
        if not self._made:
            return Spent(self.terms.unit, delta, 0.0, "RDP", {})
        different = {made: self._epsilon(made) for made in {*self._made.values()}}  # most have done the same
        epsilons = {client: different[made] for client, made in self._made.items()}
        worst = max(epsilons, key=lambda client: epsilons[client])
        epsilon, accountant = statement(self._history(self._made[worst]), delta)
        return Spent(self.terms.unit, delta, epsilon, accountant, epsilons)

    def _epsilon(self, made: _Made) -> float:
        assert self.terms is not None  # charged only under terms
        return _epsilon(self._history(made), self.terms.delta)

    def _history(self, made: _Made) -> tuple[Mechanism, ...]:
        """All of a client's orders, as an accountant takes them."""
        found = self.price(made.size)
        costs = ((found.order, made.orders), (found.evaluation, made.evaluations))
        return merged(scaled(cost, times * cost.count) for cost, times in costs if cost is not None and times)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Mechanism, ...], delta: float) -> float:
    return epsilon_of(history, delta)
