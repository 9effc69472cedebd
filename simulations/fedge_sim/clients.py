"""What a simulated client does for an order: it pays for its privacy, and does what a device does, by its trainer."""

from __future__ import annotations

from typing import Final

from fedge.events import OrderId
from fedge.privacy.secure import SecureSource
from fedge.run import RunConfig
from fedge.seeds import derive_key, work_seed
from fedge.strategy import WorkKind
from fedge.task import Task
from fedge.vector import Array
from fedge_client.torch.batches import examples
from fedge_client.torch.private.steps import Private
from fedge_client.torch.trainer import Outcome, Trainer
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts
from fedge_sim.virtual.devices import Load

_METRICS_BYTES: Final = 1024
"""Of what an evaluation sends."""


class Clients:
    """All of them, with one resident model."""

    def __init__(self, run: RunConfig, task: Task, population: Population, accounts: Accounts) -> None:
        self._run, self._population, self._accounts = run, population, accounts
        self._trainer = Trainer(task, seed=run.seed)

    def pay(self, client: str, order: OrderId) -> None:
        """A client's account is charged for an order.

        Raises:
            RefusedError: its budget is exhausted.
            TaskError: its data has no length.
        """
        if self._accounts.terms is not None:
            self._accounts.charge(client, order.kind, examples(self._population.data(client)[0]))

    def load(self, client: str, kind: WorkKind, model: Array) -> Load:
        """What an order is for a client's device.

        Raises:
            TaskError: its data has no length.
        """
        train, test = self._population.data(client)
        work = self._run.work
        if kind == "evaluate":
            return Load(model.nbytes, _METRICS_BYTES, examples(test))
        size = examples(train)
        batch = size if work.batch_size == "full" else min(work.batch_size, size)
        if kind == "gradient":
            return Load(model.nbytes, model.nbytes, batch)
        return Load(
            model.nbytes, model.nbytes, work.steps * batch if work.steps else (work.epochs or 1) * size
        )

    def memory(self, kind: WorkKind, model: Array) -> int:
        """Bytes of vectors that an order needs: the model, and to train its gradient, the update, and what the
        optimiser keeps."""
        if kind == "evaluate":
            return model.nbytes
        return model.nbytes * (3 + {"sgd": 0, "momentum": 1, "adam": 2}[self._run.work.optimizer])

    def perform(self, client: str, order: OrderId, model: Array, *, out: Array) -> Outcome:
        """An order's work on `model` (float32[size]), which the client has paid for; its vector is in `out`.

        Raises:
            RefusedError: the client does not do it.
            TaskError: its data cannot be read.
        """
        trainer, work, (train, test) = self._trainer, self._run.work, self._population.data(client)
        private = self._private(client, order, train) if self._accounts.terms is not None else None
        seed = work_seed(self._run.seed, site=client, kind=order.kind, round=order.round)
        match order.kind:
            case "train":
                return trainer.train(model, train, work, seed=seed, out=out, private=private)
            case "gradient":
                step = order.round - 1
                return trainer.gradient(model, train, work, seed=seed, step=step, out=out, private=private)
            case "evaluate":
                return trainer.evaluate(model, test, private=private)

    def _private(self, client: str, order: OrderId, train: object) -> Private | None:
        """What a client does for the privacy of its examples; its noise follows from the run's seed."""
        level = self._accounts.level(examples(train))
        if level is None:
            return None
        key = derive_key(self._run.seed, client, order.kind, order.round, order.attempt)
        return Private(level, SecureSource(key))
