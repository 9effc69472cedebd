"""The plain engine: one resident model, clients in turn, and the same round machine as in deployment.

It is the reference that faster engines must equal: it executes the machine's effects one after another,
so a seed fixes every bit of the result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedge import federation
from fedge.errors import ConfigError, RefusedError, RunError, TaskError
from fedge.federation import Finish, Plan, RunEffect, RunEvent, Stop
from fedge.history import Row
from fedge.learning import Learning
from fedge.pipeline import Update
from fedge.round import (
    Accept,
    Arrived,
    Cancel,
    Close,
    DeadlinePassed,
    Failed,
    GiveUp,
    OrderId,
    Reject,
    Send,
    StartTimer,
)
from fedge.run import RunConfig
from fedge.seeds import work_seed
from fedge.strategy import load_strategy
from fedge.task import Task, load_task
from fedge.vector import Array
from fedge_client.gate import Released, layers_of, release
from fedge_client.torch.framework import framework
from fedge_client.torch.threads import suitable_threads, using_threads
from fedge_client.torch.trainer import Trainer
from fedge_sim.population import Population
from fedge_sim.result import Result

Callback = Callable[[Row], None]
"""Called with each committed round; for an evaluated one a second time, with the evaluation's metrics."""


def simulate(
    run: RunConfig | Path | str,
    *,
    task: Task | None = None,
    clients: int | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Run a federation on this machine. The same run and seed give the same bits.

    `run` is a RunConfig or the path of a run.toml, from whose folder the task is then imported; `task`
    takes the place of the task it names, and `clients`, `rounds` and `seed` of its own numbers.
    KeyboardInterrupt ends the run at its last committed round, with the status "stopped".

    Raises:
        ConfigError: the run, or a combination of its settings, is wrong.
        TaskError: the task's code fails on a client.
    """
    folder = None
    if not isinstance(run, RunConfig):
        folder = Path(run).parent.resolve()
        run = RunConfig.load(Path(run))
    run = _with(run, clients=clients, rounds=rounds, seed=seed)
    if task is None:
        task = load_task(run.task, path=folder)
    engine = _Engine(run, task, tuple(callbacks))
    with using_threads(engine.threads):
        try:
            engine.run()
        except KeyboardInterrupt:
            engine.stop()
    return engine.result()


def _with(run: RunConfig, *, clients: int | None, rounds: int | None, seed: int | None) -> RunConfig:
    """The run with these numbers in place of its own, checked like its own."""
    table = run.model_dump(exclude_unset=True)
    table |= {key: value for key, value in (("rounds", rounds), ("seed", seed)) if value is not None}
    if clients is not None:
        table["simulation"] = {**table.get("simulation", {}), "clients": clients}
    changed = RunConfig.from_table(table, source=f"run {run.name!r}")
    count, needed = changed.simulation.clients, changed.cohort.needed
    if count < needed:
        raise ConfigError(
            f"simulation.clients: expected at least the {needed} clients that a round needs "
            f"(cohort.quorum, or cohort.size without one), found {count}"
        )
    return changed


class _Engine:
    """Executes the machine's effects: a queue of orders, one trainer, no clock but for the report."""

    def __init__(self, run: RunConfig, task: Task, callbacks: tuple[Callback, ...]) -> None:
        self._run = run
        self._callbacks = callbacks
        self._population = Population.of(run, task, count=run.simulation.clients)
        strategy = load_strategy(run.strategy, run.work)
        self._learning = Learning.begin(strategy, framework.initial_model(task, seed=run.seed))
        self._trainer = Trainer(task, seed=run.seed)
        self.threads = suitable_threads(self._trainer.layout.size)
        self._layers = layers_of(run.privacy.clip)
        kind = self._learning.order(1).kind
        plan = Plan.of(run, kind=kind, max_staleness=strategy.max_staleness)
        self._machine, effects = federation.begin(plan, frozenset(self._population.names))
        self._effects = effects
        self._orders: deque[tuple[Send, Array]] = deque()
        self._timers: dict[tuple[OrderId, str], tuple[float, DeadlinePassed]] = {}
        self._rows: list[Row] = []
        self._refused = self._up = self._down = 0
        self._began = time.perf_counter()
        self._out: Array = np.empty(self._learning.layout.size, np.float32)

    def run(self) -> None:
        """Until the run is over."""
        try:
            self._execute(self._effects, None)
            while self._machine.status == "running":
                if self._orders:
                    send, model = self._orders.popleft()
                    self._work(send, model)
                else:
                    # Nobody is at work: what the machine waits for can only be its next deadline.
                    key = min(self._timers, key=lambda key: self._timers[key][0])
                    self._handle(self._timers.pop(key)[1], None)
        except RunError as error:
            self._machine, effects = federation.fail(self._machine, str(error))
            self._execute(effects, None)

    def stop(self) -> None:
        self._handle(Stop(), None)

    def result(self) -> Result:
        return Result(
            run=self._run,
            clients=len(self._population.names),
            history=tuple(self._rows),
            model=self._learning.model,
            status=self._machine.status,
            reason=self._machine.reason,
            strategy=repr(self._learning.strategy),
        )

    def _work(self, send: Send, model: Array) -> None:
        """One client's part of a round, and the gate that its update would pass on a device."""
        client, order = send.client, send.order
        train, test = self._population.data(client)
        seed = work_seed(self._run.seed, site=client, kind=order.kind, round=order.round)
        work = self._run.work
        try:
            match order.kind:
                case "train":
                    done = self._trainer.train(model, train, work, seed=seed, out=self._out)
                case "gradient":
                    step = order.round - 1
                    done = self._trainer.gradient(model, train, work, seed=seed, step=step, out=self._out)
                case "evaluate":
                    done = self._trainer.evaluate(model, test)
        except TaskError as error:
            raise TaskError(f"{client}, {order}: {error}") from error
        layout = None if order.kind == "evaluate" else self._learning.layout
        try:
            released = release(self._out, done.num_examples, done.metrics, layout=layout, layers=self._layers)
        except RefusedError as error:
            self._handle(Failed(client, order, error.refusal), None)
            return
        self._handle(Arrived(client, order), released)

    def _handle(self, event: RunEvent, released: Released | None) -> None:
        if isinstance(event, Failed):
            self._refused += 1
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
                    self._refused += 1
                case Cancel(client, order):
                    self._orders = deque(item for item in self._orders if item[0] != Send(client, order))
                case StartTimer(order, phase, seconds):
                    self._timers[order, phase] = (seconds, DeadlinePassed(order, phase))
                case Close(order, _):
                    self._close(order)
                case GiveUp(order, _):
                    self._learning = self._learning.abandon(order)
                    self._drop_timers(order)
                case Finish():
                    self._orders.clear()

    def _send(self, send: Send) -> None:
        if not self._orders and send.order.kind != "evaluate" and not self._up:
            self._began = time.perf_counter()
        model = self._learning.model.vector
        self._orders.append((send, model))
        self._down += model.nbytes

    def _fold(self, client: str, order: OrderId, staleness: int, released: Released) -> None:
        vector = released.vector
        update = Update(client, vector, released.num_examples, released.metrics, staleness)
        self._learning = self._learning.fold(order, update)
        self._up += vector.nbytes

    def _close(self, order: OrderId) -> None:
        self._drop_timers(order)
        self._learning, aggregate = self._learning.close(order)
        if order.kind == "evaluate":
            row = self._rows[order.round - 1]
            row = replace(row, metrics={**row.metrics, **aggregate.metrics})
            self._rows[order.round - 1] = row
        else:
            now = time.perf_counter()
            row = Row(
                round=order.round,
                attempt=order.attempt,
                clients=aggregate.clients,
                num_examples=aggregate.num_examples,
                seconds=now - self._began,
                bytes_down=self._down,
                bytes_up=self._up,
                refused=self._refused,
                staleness=aggregate.staleness,
                metrics=aggregate.metrics,
            )
            self._rows.append(row)
            self._refused = self._up = self._down = 0
            self._began = now
        for callback in self._callbacks:
            callback(row)

    def _drop_timers(self, order: OrderId) -> None:
        self._timers = {key: timer for key, timer in self._timers.items() if key[0] != order}
