"""The faults of a simulation: which client is struck, at which order, and until when.

Only bad luck is here. What follows from it is the business of the machine, the gate and the engine, to
which a fault is nothing but what a coordinator would see of one: events, and an update that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from fedge.events import OrderId, Send
from fedge.run_state import Federation
from fedge.seeds import derive_seed
from fedge.simulation import FaultsConfig
from fedge.vector import Array

Fault = Literal["dropout", "failure", "straggler", "corruption", "duplicate", "delay"]
FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)

_BITS = 53
"""Of a draw: as many as a float in [0, 1) has, so that a probability of 1 is certain."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A client's fault at an order that it was given."""

    fault: Fault
    client: str
    order: OrderId


@dataclass(frozen=True, slots=True)
class Injected:
    """Everything that was made to go wrong: the clients' faults as they came, and the coordinator's crashes."""

    strikes: tuple[Strike, ...] = ()
    crashes: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of fault struck, and "crash" for the coordinator's."""
        faults = [strike.fault for strike in self.strikes]
        return {fault: faults.count(fault) for fault in FAULTS} | {"crash": self.crashes}


def draw(faults: FaultsConfig, *, seed: int, client: str, order: OrderId) -> Fault | None:
    """The fault that a client has at an order: a hash, so neither who works first nor how often matters."""
    drawn = derive_seed(seed, "fault", order.kind, order.round, order.attempt, client) >> (63 - _BITS)
    left = drawn / 2**_BITS
    for fault in FAULTS:
        probability: float = getattr(faults, fault)
        if left < probability:
            return fault
        left -= probability
    return None


class Faults:
    """The faults of one simulation: those that were injected, and those that are not over yet.

    `away` are the clients whose link is broken, with the order that they were lost at; `late` are the
    orders, with their models, whose updates will come when they do not count any more.
    """

    def __init__(self, config: FaultsConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._possible = any(getattr(config, fault) for fault in FAULTS)
        self._struck: dict[Send, Fault] = {}
        self._events = self._crashes = 0
        self.away: dict[str, OrderId] = {}
        self.late: dict[Send, Array] = {}

    @property
    def injected(self) -> Injected:
        strikes = tuple(Strike(fault, send.client, send.order) for send, fault in self._struck.items())
        return Injected(strikes, self._crashes)

    @property
    def may_strike(self) -> bool:
        """Whether anything can go wrong at all."""
        return self._possible or self.may_crash

    @property
    def may_crash(self) -> bool:
        """Whether the coordinator crashes at times, and so has to keep what a deployed one keeps."""
        return self._config.crash_every > 0

    def strike(self, send: Send) -> Fault | None:
        """What goes wrong now that a client begins with an order; once at most, if it is given it again."""
        if not self._possible or send in self._struck:
            return None
        fault = draw(self._config, seed=self._seed, client=send.client, order=send.order)
        if fault is not None:
            self._struck[send] = fault
        return fault

    def delay_s(self, send: Send) -> float:
        """How long an order's update is delayed that this fault strikes: exponential."""
        order = send.order
        drawn = derive_seed(self._seed, "delay", order.kind, order.round, order.attempt, send.client) >> (
            63 - _BITS
        )
        return -self._config.delay_s * math.log(1.0 - drawn / 2**_BITS)

    def crash(self) -> bool:
        """Whether the coordinator crashes at this event."""
        if not self.may_crash:
            return False
        self._events += 1
        crashes = self._events % self._config.crash_every == 0
        self._crashes += crashes
        return crashes

    def back(self, machine: Federation) -> str | None:
        """A client whose link works again, because the round that it was lost in is over."""
        found = next((client for client, order in self.away.items() if is_over(machine, order)), None)
        if found is not None:
            del self.away[found]
        return found

    def overdue(self, machine: Federation) -> Send | None:
        """An order whose update comes now, because it does not count any more."""
        found = next((send for send in self.late if is_too_late(machine, send.order)), None)
        if found is not None:
            del self.late[found]
        return found

    def forget(self, client: str) -> None:
        """A client is gone, and what it would have sent late with it."""
        self.late = {send: model for send, model in self.late.items() if send.client != client}

    def late_but_wanted(self, machine: Federation) -> dict[Send, Array]:
        """What will be worked on after its deadline: without rounds, the model may not have moved on by then."""
        wanted = {send: model for send, model in self.late.items() if not is_too_late(machine, send.order)}
        self.late = {send: model for send, model in self.late.items() if send not in wanted}
        return wanted


def is_over(machine: Federation, order: OrderId) -> bool:
    """Whether an order's round is over. Without rounds: the model moved on, or nobody is at work."""
    if machine.plan.max_staleness is not None and order.kind != "evaluate":
        return order.round <= machine.committed or not machine.at_work
    return order not in [round.order for round in (machine.training, machine.evaluation) if round is not None]


def is_watched(machine: Federation, order: OrderId, deadline: OrderId) -> bool:
    """Whether a deadline is about work on an order: without rounds it is about any of its kind."""
    if machine.plan.max_staleness is not None and order.kind != "evaluate":
        return order.kind == deadline.kind
    return order == deadline


def is_too_late(machine: Federation, order: OrderId) -> bool:
    """Whether an update for an order would be refused, whatever is in it, because of when it comes."""
    bound = machine.plan.max_staleness
    if bound is not None and order.kind != "evaluate" and machine.committed < machine.plan.rounds:
        return machine.committed + 1 - order.round > bound
    return is_over(machine, order)


def corrupt(send: Send, vector: Array, metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Make what a client's work gave not finite: one element of the vector, or an evaluation's metrics."""
    if send.order.kind == "evaluate":
        return dict.fromkeys(metrics, math.nan)
    drawn = derive_seed(0, "corruption", str(send.order), send.client)
    vector[drawn % len(vector)] = (math.nan, math.inf, -math.inf)[drawn % 3]
    return metrics
