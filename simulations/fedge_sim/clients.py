"""What a simulated client does for an order: it pays for its privacy, and does what a device does, by its trainer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from fedge.errors import FedgeError
from fedge.events import OrderId, Send
from fedge.privacy.secure import SecureSource
from fedge.run import RunConfig, Work
from fedge.seeds import derive_key, work_seed
from fedge.task import Task
from fedge.vector import Array, all_finite
from fedge_client.local import Outcome
from fedge_client.torch.batches import examples
from fedge_client.torch.framework import framework
from fedge_client.torch.own_layers import OwnLayers
from fedge_client.torch.private.independence import TRIED
from fedge_client.torch.private.steps import Private
from fedge_client.torch.trainer import Trainer
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts
from fedge_sim.variates import Given, Own
from fedge_sim.virtual.devices import Load

_METRICS_BYTES: Final = 1024
"""Of what an evaluation sends."""


class Clients:
    """All of them, with one resident model."""

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        population: Population,
        accounts: Accounts,
        own: Own | None = None,
    ) -> None:
        """
        Raises:
            LayoutError: the model has no such personal layers.
        """
        self._run, self.population, self._accounts = run, population, accounts
        self.own = own if own is not None else Given()
        self._task, self._prepared = task, False
        self._trainer = Trainer(task, seed=run.seed)
        self.layers = (
            OwnLayers(task, self._trainer.layout, run.work.personal, seed=run.seed)
            if run.work.personal
            else None
        )

    def pay(self, client: str, order: OrderId) -> None:
        """A client's account is charged for an order.

        Raises:
            RefusedError: its budget is exhausted.
            TaskError: its data has no length.
        """
        if self._accounts.terms is not None:
            self._accounts.charge(client, order.kind, examples(self.population.data(client)[0]))

    def demands(self, send: Send, model: Array) -> tuple[Load, int]:
        """What an order is for a client's device, and the bytes of vectors that it needs: the model, and to train its
        gradient, the update, and what the optimiser keeps.

        Raises:
            TaskError: its data has no length.
        """
        if self._run.simulation.devices is None:
            return Load(0, 0, 0), 0
        train, test = self.population.data(send.client)
        work, kind = self._run.work, send.order.kind
        if kind == "evaluate":
            return Load(model.nbytes, _METRICS_BYTES, examples(test)), model.nbytes
        size = examples(train)
        batch = size if work.batch_size == "full" else min(work.batch_size, size)
        slots = {"sgd": 0, "momentum": 1, "adam": 2}[work.optimizer]
        own = 4 * self.own.size
        memory = model.nbytes * (3 + slots + (kind == "train" and work.proximal > 0)) + own
        if kind == "gradient":
            return Load(model.nbytes, model.nbytes, batch), memory
        number = work.steps * batch if work.steps else (work.epochs or 1) * size
        return Load(model.nbytes + (own if self.layers is None else 0), model.nbytes, number), memory

    def perform(self, client: str, order: OrderId, model: Array, *, out: Array) -> Outcome:
        """An order's work on `model` (float32[size]), which the client has paid for; its vector is in `out`.

        Raises:
            RefusedError: the client does not do it.
            TaskError: its data cannot be read.
        """
        trainer, work, (train, test) = self._trainer, self._run.work, self.population.data(client)
        private = self.private(client, order, train)
        seed = work_seed(self._run.seed, site=client, kind=order.kind, round=order.round)
        match order.kind:
            case "train" if self.layers is not None:
                own = self._own_layers(client, order).copy()
                trained = partial(_train, trainer, train, work, seed=seed, private=private)
                done = self.layers.train(trained, model, own, out=out)
                self.own.learned(client, order, own)
                return done
            case "train":
                correction = self.own.of(client, order)
                return trainer.train(
                    model, train, work, seed=seed, out=out, correction=correction, private=private
                )
            case "gradient":
                step = order.round - 1
                return trainer.gradient(model, train, work, seed=seed, step=step, out=out, private=private)
            case "evaluate":
                if self.layers is not None:
                    model = self.layers.split.join(model, self._own_layers(client, order))
                return trainer.evaluate(model, test, private=private)

    def _own_layers(self, client: str, order: OrderId) -> Array:
        found = self.own.of(client, order)
        assert found is not None  # everybody has some
        return found

    def attempt(self, send: Send, model: Array, *, out: Array) -> Outcome | None:
        """`perform` for another process; None if that fails, or comes to something that is not finite: the simulation
        does it again, and says whose fault it is."""
        try:
            done = self.perform(send.client, send.order, model, out=out)
        except FedgeError:
            return None
        if send.order.kind != "evaluate" and not all_finite(out):
            return None
        return Outcome(done.num_examples, {name: float(value) for name, value in done.metrics.items()})

    def _prepare(self) -> None:
        """Choose how examples' gradients are clipped once for all, by the first client that has enough of them to tell,
        so that it does not depend on who works first, or in which process.

        Raises:
            RefusedError, TaskError: see `Trainer.prepare_private`.
        """
        if self._prepared:
            return
        best = max(self._sizes(), key=lambda each: (min(each[0], TRIED), each[1]))
        model = framework.initial_model(self._task, seed=self._run.seed, unit=self._run.privacy.unit)
        self._trainer.prepare_private(model.vector, self.population.data(self.population.names[-best[1]])[0])
        self._prepared = True

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """Examples of each client, with its index below zero; the first that has enough is the last."""
        for index, name in enumerate(self.population.names):
            size = examples(self.population.data(name)[0])
            yield size, -index
            if size >= TRIED:
                return

    def private(self, client: str, order: OrderId, train: object) -> Private | None:
        """What a client does for the privacy of its examples, if anything; its noise follows from the run's seed.

        Raises:
            ConfigError: no noise keeps the run's terms there.
            RefusedError, TaskError: see `Trainer.prepare_private`.
        """
        level = self._accounts.level(examples(train)) if self._accounts.terms is not None else None
        if level is None:
            return None
        self._prepare()
        key = derive_key(self._run.seed, client, order.kind, order.round, order.attempt)
        return Private(level, SecureSource(key))


def _train(
    trainer: Trainer,
    train: Any,
    work: Work,
    model: Array,
    out: Array,
    *,
    seed: int,
    private: Private | None,
) -> Outcome:
    return trainer.train(model, train, work, seed=seed, out=out, private=private)
