"""What drives a simulation: the same round machine as in deployment, whose effects are executed one after another.

Clients' work is an engine's, or is done here with one resident model, which is the reference that engines must equal.
A seed fixes every bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedge import federation
from fedge.errors import ConfigError, RefusedError, RunError, TaskError
from fedge.events import (
    Accept,
    Arrived,
    Cancel,
    Close,
    DeadlinePassed,
    Disclose,
    Enlist,
    Event,
    Failed,
    GiveUp,
    Joined,
    Left,
    Mask,
    OrderId,
    Progressed,
    Reject,
    Remind,
    Send,
    StartTimer,
    Survive,
    Unmask,
)
from fedge.learning import Learning
from fedge.pipeline import Aggregate, Update
from fedge.plan import Plan
from fedge.privacy.central import Central
from fedge.privacy.secure import SecureSource
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.run_state import Finish, RunEffect, RunEvent, Stop
from fedge.secagg.terms import SumTerms
from fedge.seeds import derive_key
from fedge.strategy import WorkKind, load_strategy
from fedge.task import OwnTask, Task, first_model
from fedge.turnover import Turnover
from fedge.vector import Array
from fedge_client.gate import Released, layers_of, release
from fedge_client.torch.threads import suitable_threads
from fedge_sim.adversaries import Adversaries
from fedge_sim.crash import check_stuck, restarted
from fedge_sim.engines.chosen import Origin, Wanted, employed
from fedge_sim.engines.together import all_pass
from fedge_sim.faults import Fault, Faults, corrupt, is_watched
from fedge_sim.population import Population, labels_by_client
from fedge_sim.privacy import Accounts
from fedge_sim.record import Callback, Record
from fedge_sim.result import Result
from fedge_sim.secure import SecureSums
from fedge_sim.variates import own_vectors
from fedge_sim.virtual.clock import Clock, Due, Finished, Happening, Overfull, clock_of


@dataclass(frozen=True, slots=True, eq=False)
class _Last:
    """The updates that have just ended their order; `as_made`: those of the crew, all of them and unchanged."""

    updates: tuple[Update, ...] = ()
    as_made: bool = False


class Driver:
    """Executes the machine's effects: a queue of orders, in turn or by virtual time.

    `_machine`, `_learning`, `_kept` and `_timers` are the coordinator's; a crash leaves it what a deployed
    one keeps. `_orders` and `_faults` are the clients'.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task | OwnTask,
        callbacks: tuple[Callback, ...],
        wanted: Wanted,
        origin: Origin,
    ) -> None:
        self._run = run
        self._population = Population.of(run, task, count=run.simulation.clients)
        strategy = load_strategy(run)
        first = first_model(task, seed=run.seed, unit=run.privacy.unit, personal=run.work.personal)
        self._learning = Learning.begin(strategy, first, Central.of(run))
        self.threads = suitable_threads(self._learning.layout.size)
        kind = self._learning.order(1).kind
        self._own = own_vectors(run, task, self._learning.order(1).control)
        sums = SumTerms.of(run, strategy, self._learning.layout)
        self._accounts = Accounts(run, kind, sums.mechanism if sums is not None else None)
        terms = self._accounts.terms
        # At example level the clip is for the gradients of examples, not for updates.
        self._clip = None if terms and terms.unit == "example" else run.privacy.clip
        self._stuck = 0  # crashes since a round was committed
        self._secure = SecureSums.of(run, sums, self._learning.layout.size, self._population.names)
        secure = self._secure.of_round if self._secure is not None else None
        plan = Plan.of(run, kind=kind, max_staleness=strategy.max_staleness, secure=secure)
        names = self._population.names
        plan.check_population(len(names))
        self._clock = clock_of(run, names, folder=origin.folder)
        self._record = Record(callbacks, self._clock, self._accounts)
        present = frozenset(names) if self._clock is None else self._clock.present
        self._machine, self._effects = federation.begin(plan, present)
        self._orders: dict[Send, Array] = {}
        self._faults = Faults(run.simulation.faults, seed=run.seed)
        streams = strategy.reduction.streams and self._secure is None
        plain = streams and terms is None and run.privacy.clip is None
        self._undisturbed = plain and not self._faults.may_strike and self._clock is None
        self._turnover = Turnover(noted=not self._faults.may_strike)
        self._adversaries = Adversaries.of(run.simulation.adversaries, self._population.names, seed=run.seed)
        self._kept: dict[WorkKind, list[tuple[OrderId, Update]]] = {}
        self._timers: dict[tuple[OrderId, str], tuple[float, DeadlinePassed]] = {}
        self._last = _Last()
        self._out: Array = np.empty(self._learning.layout.size, np.float32)
        size = self._learning.layout.size
        self._clients, self._ahead = employed(
            wanted,
            run,
            task,
            self._population,
            self._accounts,
            self._own,
            kind=kind,
            size=size,
            origin=origin,
        )
        self._engine = self._ahead.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine = self._ahead.name
        self._ahead.close()
        self._own.close()

    def run(self) -> None:
        """Until the run is over."""
        try:
            self._execute(self._effects, None)
            while self._machine.status == "running":
                self._go_on()
        except RunError as error:
            self._fail(str(error))
        except (TaskError, ConfigError) as error:
            if not self._record.rows:
                raise
            self._fail(str(error))
        except MemoryError:
            self._fail(
                "the simulation is out of memory: lower cohort.size, the model, or what the task's data(site) keeps; "
                "the rounds that were committed are kept"
            )

    def _fail(self, reason: str) -> None:
        """The run is over; its rounds are kept."""
        self._machine, effects = federation.fail(self._machine, reason)
        self._execute(effects, None)

    def stop(self) -> None:
        self._step(Stop(), None)

    def result(self) -> Result:
        return Result(
            run=self._run,
            clients=len(self._population.names),
            history=tuple(self._record.rows),
            seen=tuple(self._record.seen),
            labels=labels_by_client(self._population) if self._machine.status == "done" else {},
            model=self._learning.model,
            status=self._machine.status,
            reason=self._machine.reason,
            strategy=repr(self._learning.strategy),
            faults=self._faults.injected,
            privacy=self._accounts.spent(),
            engine=self._engine,
        )

    def _go_on(self) -> None:
        """The next thing that happens: somebody is back, late or at work, or else a deadline passes."""
        if (client := self._faults.back(self._machine)) is not None:
            if self._clock is None or client in self._clock.present:
                self._handle(Joined(client), None)
        elif self._secure is not None and self._secure.events:
            self._handle(self._secure.events.popleft(), None)
        elif (late := self._faults.overdue(self._machine)) is not None:
            self._handle(Arrived(late.client, late.order), None)  # nobody will look at what was computed
        elif self._clock is not None:
            if not self._turnover.take(self._machine, what := self._clock.next()):
                self._machine = self._turnover.applied(self._machine)
                self._happen(self._clock, what)
        elif self._orders:
            send = next(iter(self._orders))
            if not self._do_together(send):
                self._begin(send, self._orders.pop(send))
        else:  # nobody is at work: what the machine waits for can only be its next deadline
            self._expire(min(self._timers, key=lambda key: self._timers[key][0]))

    def _happen(self, clock: Clock, what: Happening) -> None:
        """What comes next in virtual time."""
        match what:
            case Finished(send):
                clock.stop(send, wasted=False)
                self._begin(send, self._orders.pop(send))
            case Overfull(send):
                self._drop(send)
                refusal = Refusal(RefusalCode.OUT_OF_MEMORY, "the order does not fit in the device's memory")
                self._handle(Failed(send.client, send.order, refusal), None)
            case Joined(client):
                if client not in self._faults.away:
                    self._handle(what, None)
            case Left(client):
                self._leave(client)
            case Due(event, at) if self._timers.get((event.order, event.phase)) == (at, event):
                if event.phase == "open":  # a deployed client says so every few seconds
                    for send in [
                        each for each in self._orders if is_watched(self._machine, each.order, event.order)
                    ]:
                        self._step(Progressed(send.client, send.order, clock.permille(send)), None)
                if (event.order, event.phase) in self._timers:
                    self._expire((event.order, event.phase))

    def _leave(self, client: str) -> None:
        """A client's link breaks, and its work is lost."""
        for send in [each for each in self._orders if each.client == client]:
            self._drop(send)
        if self._clock is not None:
            self._faults.forget(client)
        self._handle(Left(client), None)

    def _drop(self, send: Send) -> None:
        """Nobody works on an order any more, if somebody does."""
        if self._orders.pop(send, None) is not None and self._clock is not None:
            self._clock.stop(send, wasted=True)

    def _begin(self, send: Send, model: Array) -> None:
        """A client turns to an order; a fault may come before the work, instead of it, or into it."""
        client, order = send.client, send.order
        match self._faults.strike(send):
            case "dropout":
                self._faults.away[client] = order
                self._leave(client)
            case "failure":
                refusal = Refusal(RefusalCode.TASK_FAILED, "a fault that the simulation injected")
                self._handle(Failed(client, order, refusal), None)
            case "straggler":
                self._faults.late[send] = model
            case "delay" if self._clock is not None:
                self._orders[send] = model
                self._clock.postpone(send, self._faults.delay_s(send))
            case fault:
                self._work(send, model, fault)

    def _do_together(self, first: Send) -> bool:
        """The work of all who have the same order, and their arrivals, at once: the same as one after another where
        nothing can come between them. False if it cannot be done."""
        model, order = self._orders[first], first.order
        training = self._machine.training
        if not self._undisturbed or training is None or order != training.order:
            return False
        room = training.terms.size - len(training.accepted)
        sends = [send for send, its in self._orders.items() if send.order == order and its is model][:room]
        trained = self._ahead.together(sends, model)
        if trained is None:
            return False
        outcomes, vectors = trained
        if not all_pass(outcomes):
            self._ahead.keep(sends, outcomes, vectors)
            return False
        sends = sends[: len(outcomes)]
        clients = [send.client for send in sends]
        for send in sends:
            del self._orders[send]
        self._machine, effects = federation.arrive(self._machine, clients, order)
        made = dict(zip(clients, zip(outcomes, vectors, strict=True), strict=True))
        updates = []
        for effect in effects:
            if isinstance(effect, Accept):
                client, (outcome, vector) = effect.client, made[effect.client]
                if client in self._adversaries.tampering:
                    vector = self._adversaries.tampered(client, order.kind, order.round, vector[:])
                updates.append(
                    Update(client, vector, outcome.num_examples, outcome.metrics, effect.staleness)
                )
                self._own.take(client, order, vector)
        self._record.up += len(updates) * model.nbytes
        if any(isinstance(effect, Close) and effect.order == order for effect in effects):
            as_made = len(updates) == len(sends) and not self._adversaries.tampering
            self._last = _Last(tuple(updates), as_made)  # they need not be kept
        else:
            self._learning = self._learning.fold(order, *updates)
        self._execute(tuple(effect for effect in effects if not isinstance(effect, Accept)), None)
        return True

    def _expire(self, key: tuple[OrderId, str]) -> None:
        """A deadline passes."""
        event = self._timers.pop(key)[1]
        self._handle(event, None)
        if event.phase == "open":
            for send, model in self._faults.late_but_wanted(self._machine).items():
                self._orders[send] = model
                self._time(send, model)

    def _work(self, send: Send, model: Array, fault: Fault | None) -> None:
        """One client's part of a round, and the gate that its update would pass on a device."""
        client, order = send.client, send.order
        out = self._out
        try:
            self._clients.pay(client, order)
            if (ahead := self._ahead.take(send, model, self._others)) is not None:
                done, out = ahead
            else:
                done = self._clients.perform(client, order, model, out=out)
        except RefusedError as error:
            self._handle(Failed(client, order, error.refusal), None)
            return
        except TaskError as error:
            raise TaskError(f"{client}, {order}: {error}") from error
        metrics = corrupt(send, out, done.metrics) if fault == "corruption" else done.metrics
        layout = None if order.kind == "evaluate" else self._learning.layout
        try:
            released = release(
                out,
                done.num_examples,
                metrics,
                layout=layout,
                layers=layers_of(noising.clip if (noising := self._learning.noising) else self._clip),
                terms=self._accounts.terms,
            )
        except RefusedError as error:
            self._handle(Failed(client, order, error.refusal), None)
            return
        vector = self._adversaries.tampered(client, order.kind, order.round, released.vector)
        sent = replace(released, vector=vector)
        self._handle(Arrived(client, order), sent)
        if fault == "duplicate":
            self._handle(Arrived(client, order), sent)

    def _handle(self, event: Event, released: Released | None) -> None:
        """Something happens to the coordinator, which may crash at it; then it happens once more."""
        if self._faults.crash():
            self._restart(event)
            if isinstance(event, DeadlinePassed):
                self._timers.pop((event.order, event.phase), None)
        self._step(event, released)

    def _restart(self, event: Event) -> None:
        """The coordinator dies before it has taken note of an event, and starts again from what was kept.

        The clients come back; what is not asked of them again is no longer wanted.
        """
        self._stuck += 1
        check_stuck(self._stuck, self._machine.committed + 1, self._run.simulation.faults)
        absent = frozenset[str]() if self._clock is None else self._machine.clients - self._clock.present
        again = restarted(self._machine, self._learning, self._kept, gone=absent.union(self._faults.away))
        self._machine, self._learning, self._kept = again.machine, again.learning, again.kept
        self._timers.clear()
        if self._secure is not None:
            self._secure.clear()
        asked = {effect for effect in again.effects if isinstance(effect, Send)}
        for send in [each for each in self._orders if each not in asked]:
            self._drop(send)
        ready = Send(event.client, event.order) if isinstance(event, Arrived | Failed) else None
        self._execute(tuple(effect for effect in again.effects if effect != ready), None)

    def _step(self, event: RunEvent, released: Released | None) -> None:
        if isinstance(event, Failed):
            self._record.refused += 1
        self._machine, effects = federation.step(self._machine, event)
        self._execute(effects, released)

    def _execute(self, effects: tuple[RunEffect, ...], released: Released | None) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Accept(client, order, staleness):
                    assert released is not None  # an Accept answers an Arrived, which carries one
                    self._fold(client, order, staleness, released)
                case Reject():
                    self._record.refused += 1
                case Cancel(client, order):
                    self._drop(Send(client, order))
                case StartTimer(order, phase, seconds):
                    event = DeadlinePassed(order, phase)
                    due = seconds if self._clock is None else self._clock.remind(event, seconds)
                    self._timers[order, phase] = (due, event)
                case Close(order, _):
                    self._close(order)
                case GiveUp(order, _):
                    self._give_up(order)
                case Finish():
                    for send in list(self._orders):
                        self._drop(send)
                case Enlist() | Mask() | Remind() | Survive() | Disclose() | Unmask():
                    assert self._secure is not None  # only such rounds want it
                    self._secure.do(effect)

    def _send(self, send: Send) -> None:
        if send in self._orders or (self._faults.late and send in self._faults.late):
            return  # a coordinator that has started again tells a client what it is doing already
        if not self._orders and send.order.kind != "evaluate" and not self._record.up:
            self._record.begin()
        if self._secure is not None:
            self._secure.ask(send.client, send.order)
        model = self._learning.vector
        self._orders[send] = model
        self._record.down += model.nbytes + (self._own.nbytes if send.order.kind == "train" else 0)
        self._time(send, model)

    def _time(self, send: Send, model: Array) -> None:
        """A client begins with an order, for as long as it takes in virtual time."""
        if self._clock is not None:
            self._clock.give(send, *self._clients.demands(send, model))

    def _fold(self, client: str, order: OrderId, staleness: int, released: Released) -> None:
        if order.kind == "evaluate":
            self._record.hear(order, client, released.metrics)
        else:
            self._own.take(client, order, released.vector)
        if self._secure is not None:
            self._record.up += self._secure.add(client, order, released)
            return
        vector = released.vector
        update = Update(client, vector, released.num_examples, released.metrics, staleness)
        streams = self._learning.streams(order)
        if streams:
            self._learning = self._learning.fold(order, update)
        if self._faults.may_crash or not streams:
            kept = replace(update, vector=vector.copy())  # the next client's work is written over it
            self._kept.setdefault(order.kind, []).append((order, kept))
        self._record.up += vector.nbytes

    def _give_up(self, order: OrderId) -> None:
        if self._secure is not None:
            self._secure.drop(order)
        self._learning = self._learning.abandon(order)
        self._kept.pop(order.kind, None)
        self._drop_timers(order)
        if order.kind != "evaluate" and self._machine.committed == order.round:  # it is spent, and over
            self._commit(order, Aggregate(np.zeros(0, np.float32), (), 0))

    def _close(self, order: OrderId) -> None:
        self._drop_timers(order)
        kept = self._kept.pop(order.kind, [])
        waiting = [] if self._learning.streams(order) else [update for _, update in kept]
        if self._secure is not None:
            self._learning, aggregate = self._learning.close_with(order, self._secure.take(order))
        else:
            last, self._last = self._last, _Last()
            self._learning, aggregate = self._closed(order, waiting, last)
        if order.kind != "evaluate":
            self._commit(order, aggregate)
            return
        self._record.judge(order, aggregate.metrics)

    def _closed(self, order: OrderId, waiting: list[Update], last: _Last) -> tuple[Learning, Aggregate]:
        """An order's end, with its last updates, whose mean the crew may make that has made them."""
        learning, source = self._learning, self._noise(order)
        weights = learning.weights(order, *last.updates) if last.as_made else None
        mean = self._ahead.mean(weights) if weights is not None else None
        if mean is None:
            return learning.close(order, *waiting, *last.updates, source=source)
        return learning.close_with(order, learning.described(order, mean, *last.updates), source=source)

    def _commit(self, order: OrderId, aggregate: Aggregate) -> None:
        """A round is committed."""
        self._stuck = 0
        self._own.commit(order, aggregate.clients, self._learning.order(order.round + 1).control)
        self._record.put(order, aggregate)

    def _others(self) -> dict[Send, Array]:
        """Orders that are worked on and will be finished."""
        if self._clock is None:
            return self._orders
        clock = self._clock
        return {send: its for send, its in self._orders.items() if clock.comes_to_something(send)}

    def _noise(self, order: OrderId) -> SecureSource | None:
        """The coordinator's own noise, which follows from the run's seed."""
        if self._learning.central is None:
            return None
        return SecureSource(derive_key(self._run.seed, "coordinator", order.kind, order.round, order.attempt))

    def _drop_timers(self, order: OrderId) -> None:
        self._timers = {key: timer for key, timer in self._timers.items() if key[0] != order}
