"""A task's work at one site, by torch."""

from __future__ import annotations

from copy import copy
from typing import Any, Self

from fedge.errors import RefusedError
from fedge.events import OrderId
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.task import Site, Task
from fedge.vector import Array, Layout
from fedge_client.local import Outcome, Progress
from fedge_client.torch.batches import examples
from fedge_client.torch.framework import framework
from fedge_client.torch.own_layers import OwnLayers
from fedge_client.torch.private.steps import Private
from fedge_client.torch.threads import suitable_threads, using_threads
from fedge_client.torch.trainer import Trainer


class TorchLocal:
    """`fedge_client.local.Local`; its data are there once `load` was called."""

    def __init__(self, task: Task, work: Work, *, seed: int, threads: int | None) -> None:
        self._task, self._work, self._seed = task, work, seed
        self._trainer = Trainer(task, seed=seed)
        self._own = OwnLayers(task, self._trainer.layout, work.personal, seed=seed) if work.personal else None
        self._threads = threads or suitable_threads(self.layout.size)
        self._train: Any = ()
        self._test: Any = ()
        self.examples = (0, 0)

    def for_work(self, work: Work) -> Self:
        """The same model and data, for other work."""
        other = copy(self)
        other._work = work
        return other

    @property
    def layout(self) -> Layout:
        return self._own.split.shared if self._own is not None else self._trainer.layout

    @property
    def first_layers(self) -> Array | None:
        return self._own.first if self._own is not None else None

    def load(self, site: Site, *, private: bool) -> None:
        """Have the site's data; and, for privacy of examples, look whether they can be protected.

        Raises:
            RefusedError: NO_DATA, or MODEL_NOT_PRIVATE.
        """
        try:
            self._train, self._test = self._task.data(site)
            self.examples = examples(self._train), examples(self._test)
        except Exception as error:  # user code may raise anything
            refusal = Refusal(RefusalCode.NO_DATA, "the task found no usable data on this site")
            raise RefusedError(refusal) from error
        if private:
            # With the run's own first values: a model of zeros may look as if nothing depended on anything.
            first = framework.initial_model(self._task, seed=self._seed).vector
            self._trainer.prepare_private(first, self._train)
            self._trainer.prepare_private_evaluation(first, self._test)

    def do(
        self,
        order: OrderId,
        *,
        seed: int,
        model: Array,
        out: Array,
        private: Private | None,
        progress: Progress,
        correction: Array | None = None,
        layers: Array | None = None,
    ) -> Outcome:
        """As `Local.do`."""
        trainer, work, train = self._trainer, self._work, self._train

        def trained(model: Array, out: Array) -> Outcome:
            return trainer.train(
                model,
                train,
                work,
                seed=seed,
                out=out,
                correction=correction,
                private=private,
                progress=progress,
            )

        with using_threads(self._threads):
            match order.kind:
                case "train" if self._own is not None and layers is not None:
                    return self._own.train(trained, model, layers, out=out)
                case "train":
                    return trained(model, out)
                case "gradient":
                    return trainer.gradient(
                        model,
                        train,
                        work,
                        seed=seed,
                        step=order.round - 1,
                        out=out,
                        private=private,
                        progress=progress,
                    )
                case "evaluate":
                    if self._own is not None and layers is not None:
                        model = self._own.split.join(model, layers)
                    return trainer.evaluate(model, self._test, private=private, progress=progress)
