"""The simulated clients: their names and, when they are needed, their data."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Subset, TensorDataset

from fedge.errors import ConfigError, TaskError
from fedge.run import RunConfig
from fedge.seeds import derive_seed
from fedge.simulation import Simulation
from fedge.task import OwnTask, Site, Task
from fedge_client.torch.batches import Batches, examples
from fedge_sim import partition
from fedge_sim.adversaries import Adversaries
from fedge_sim.poison import poisoned
from fedge_sim.skew import Skew, read_classes

KEPT_CLIENTS = 4096
"""A population of so many is kept between rounds. Of a larger one, whose clients seldom meet again, two cohorts are;
the least recently used is dropped and made again."""

SHOWN_CLIENTS = 40
SHOWN_CLASSES = 50
"""In a report: the first so many, if there are no more classes than that."""

Data = tuple[Any, Any]


class Population:
    """`count` clients by name. Data is made when a client is first asked, and kept for the next time."""

    def __init__(self, count: int, make: Callable[[int], Data], *, cohort: int) -> None:
        self.names = names_of(count)
        self.most_kept = count if count <= KEPT_CLIENTS else min(KEPT_CLIENTS, 2 * cohort)
        self._index = {name: index for index, name in enumerate(self.names)}
        self._make = make
        self._kept: OrderedDict[str, Data] = OrderedDict()

    @classmethod
    def of(cls, run: RunConfig, task: Task | OwnTask, *, count: int) -> Population:
        """The population that `[simulation]` describes; of a task that trains by itself, the names alone.

        Raises:
            ConfigError, TaskError: the data cannot be divided so, or the task cannot give it.
        """
        if isinstance(task, OwnTask):
            return cls(count, _its_own, cohort=run.cohort.size)
        settings = run.simulation
        skew = Skew(settings.feature_skew, settings.label_noise, run.seed)
        names = names_of(count)
        hostile = Adversaries.of(settings.adversaries, names, seed=run.seed)

        def as_they_have_it(
            part: Callable[[int], Data], classes: torch.Tensor | None = None
        ) -> Callable[[int], Data]:
            def make(index: int) -> Data:
                name = client_name(index, count)
                if not hostile.poisons(name):
                    return skew.of(index, part(index))
                if hostile.config.attack == "sybil":
                    index = names.index(hostile.first)
                return poisoned(skew.of(index, part(index)), hostile.config, classes)

            return make

        if settings.partition == "task":
            make = as_they_have_it(lambda index: _data(task, client_name(index, count), index, count))
            return cls(count, make, cohort=run.cohort.size)
        train, test = _data(task, "population", 0, 1)
        classes = read_classes(train)[2] if any(map(hostile.poisons, names)) else None
        generator = np.random.default_rng(derive_seed(run.seed, "partition"))
        test_size = examples(test)
        parts = _parts(settings, train, count, generator)
        # With fewer test examples than clients each judges by all of them, instead of some by none.
        tests = (
            partition.iid(test_size, count, generator=generator)
            if test_size >= count
            else [np.arange(test_size)] * count
        )

        def part(index: int) -> Data:
            return Subset(train, parts[index].tolist()), Subset(test, tests[index].tolist())

        return cls(count, as_they_have_it(part, classes), cohort=run.cohort.size)

    def data(self, name: str) -> Data:
        """`(train, test)` of a client."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        data = self._make(self._index[name])
        self._kept[name] = data
        if len(self._kept) > self.most_kept:
            self._kept.popitem(last=False)
        return data


def _parts(
    settings: Simulation, train: Any, count: int, generator: np.random.Generator
) -> list[partition.Index]:
    """The examples of each client."""
    size = examples(train)
    match settings.partition:
        case "iid":
            return partition.iid(size, count, generator=generator)
        case "dirichlet":
            labels = labels_of(train, size)
            return partition.dirichlet(labels, count, alpha=settings.alpha, generator=generator)
        case "shards":
            labels, each = labels_of(train, size), settings.shards_per_client
            return partition.shards(labels, count, each=each, generator=generator)
        case "quantity":
            return partition.quantity(size, count, alpha=settings.alpha, generator=generator)
        case "groups":
            return partition.groups(groups_of(train, size), count, generator=generator)
        case "time":
            return partition.time(size, count)
        case "task":
            raise AssertionError("the task divides its data itself")


def names_of(count: int) -> tuple[str, ...]:
    """Everybody's, in order."""
    return tuple(client_name(index, count) for index in range(count))


def client_name(index: int, count: int) -> str:
    """The simulated name of a client: its index, padded so that names sort as numbers do."""
    return f"client-{index:0{len(str(count - 1))}d}"


def labels_of(dataset: Any, size: int) -> npt.NDArray[np.int64]:
    """The class of every example, which a Dirichlet partition needs.

    Raises:
        ConfigError: the targets are not whole numbers.
        TaskError: the dataset cannot be read.
    """
    odd = None
    if type(dataset) is TensorDataset:
        labels = dataset.tensors[1].numpy()
    else:
        try:
            targets = [np.asarray(dataset[index][1]) for index in range(size)]
        except Exception as error:  # user code may raise anything
            raise TaskError(f"the targets cannot be read: {type(error).__name__}: {error}") from error
        odd = next((target for target in targets if target.ndim), None)
        labels = np.asarray(targets) if odd is None else odd
    if odd is not None or labels.shape != (size,) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"simulation.partition: this one divides by class and needs integer targets, "
            f"found {labels.dtype} of shape {labels.shape}; use 'iid', or divide in the task's data(site)"
        )
    return labels.astype(np.int64)


def groups_of(dataset: Any, size: int) -> npt.NDArray[np.int64]:
    """The natural id of every example: what the dataset has as `groups`, of any kind that can be sorted.

    Raises:
        ConfigError: it has none, or not one for each example.
    """
    found = getattr(dataset, "groups", None)
    if found is None:
        raise ConfigError(
            "simulation.partition: 'groups' needs a training set with an attribute `groups`, the id (of a person, a "
            f"machine) of each example, found a {type(dataset).__name__} without it"
        )
    ids = np.asarray(found)
    if ids.shape != (size,):
        raise ConfigError(
            f"simulation.partition: expected {size} natural ids in `groups`, found {ids.dtype} of shape {ids.shape}"
        )
    numbers: npt.NDArray[np.int64] = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    return numbers


def labels_by_client(population: Population) -> dict[str, dict[int, int]]:
    """Of the first clients: how many training examples of each class. Empty where targets are no classes, or many, or
    do not lie in memory."""
    found: dict[str, dict[int, int]] = {}
    for name in population.names[:SHOWN_CLIENTS]:
        try:
            targets = _targets(population.data(name)[0])
        except (ConfigError, TaskError):
            return {}
        if targets is None or targets.ndim != 1 or targets.is_floating_point():
            return {}
        found[name] = dict(Counter(targets.tolist()))
    return found if len({label for each in found.values() for label in each}) <= SHOWN_CLASSES else {}


def _targets(train: Any) -> torch.Tensor | None:
    """All of a training set's that lie in a tensor."""
    batches = Batches(train, "full")
    return batches.tensors[1][batches.rows] if batches.tensors is not None else None


def _its_own(index: int) -> Data:
    raise TaskError("the task trains by itself: nobody else knows its data")


def _data(task: Task, name: str, index: int, count: int) -> Data:
    try:
        train, test = task.data(Site(name, index=index, count=count))
    except Exception as error:  # user code may raise anything
        raise TaskError(f"{name}: data(site) failed: {type(error).__name__}: {error}") from error
    return train, test
