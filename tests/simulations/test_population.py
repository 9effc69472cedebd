"""Simulated clients: how they are called, what data each has, and that it is made when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from fedge import RunConfig, Site, Task
from fedge.errors import ConfigError, TaskError
from fedge_sim import population
from fedge_sim.population import Population, client_name, labels_of

TRAIN, TEST = 30, 9


def whole(site: Site) -> tuple[Any, Any]:
    """Every example is its own number, so that it can be told where it went."""
    numbers = torch.arange(TRAIN + TEST)
    inputs, labels = numbers.float()[:, None], numbers % 3
    return TensorDataset(inputs[:TRAIN], labels[:TRAIN]), TensorDataset(inputs[TRAIN:], labels[TRAIN:])


def task_of(data: Callable[[Site], Any]) -> Task:
    return Task(model=torch.nn.Identity, data=data, loss=torch.nn.functional.mse_loss)


def population_of(data: Callable[[Site], Any], count: int, *, seed: int = 0, **simulation: Any) -> Population:
    table = {"name": "a", "task": "app:task", "rounds": 1, "seed": seed, "simulation": simulation}
    return Population.of(RunConfig.from_table(table, source="t"), task_of(data), count=count)


def numbers(dataset: Any) -> list[int]:
    return [int(dataset[index][0]) for index in range(len(dataset))]


def test_names_sort_as_their_numbers_do():
    for count in (1, 9, 10, 11, 100, 101, 1000):
        names = [client_name(index, count) for index in range(count)]
        assert names == sorted(names)
        assert len(set(names)) == count
    assert client_name(7, 100) == "client-07"


def test_the_task_divides_the_data_itself_by_index_and_count():
    asked: list[Site] = []

    def data(site: Site) -> tuple[Any, Any]:
        asked.append(site)
        return [(site.index, 0)], [(site.count, 0)]

    clients = population_of(data, 3)
    assert asked == [], "nobody has been asked for anything yet"
    assert clients.data("client-2") == ([(2, 0)], [(3, 0)])
    assert asked == [Site("client-2", index=2, count=3)]
    assert dict(asked[0].config) == {}


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "quantity", "time"])
def test_one_data_set_is_divided_among_the_clients_and_asked_for_once(partition: str):
    asked: list[Site] = []

    def data(site: Site) -> tuple[Any, Any]:
        asked.append(site)
        return whole(site)

    clients = population_of(data, 4, partition=partition)
    trains = [numbers(clients.data(name)[0]) for name in clients.names]
    tests = [numbers(clients.data(name)[1]) for name in clients.names]
    assert sorted(chain(*trains)) == list(range(TRAIN))
    assert sorted(chain(*tests)) == list(range(TRAIN, TRAIN + TEST))
    assert [(site.index, site.count) for site in asked] == [(0, 1)]


def test_with_fewer_test_examples_than_clients_each_judges_by_all():
    clients = population_of(whole, TEST + 1, partition="iid")
    for name in clients.names:
        assert numbers(clients.data(name)[1]) == list(range(TRAIN, TRAIN + TEST))


def test_the_runs_seed_decides_the_partition():
    def parts(seed: int) -> list[list[int]]:
        clients = population_of(whole, 4, seed=seed, partition="dirichlet")
        return [numbers(clients.data(name)[0]) for name in clients.names]

    assert parts(1) == parts(1)
    assert parts(1) != parts(2)


def test_data_is_kept_between_rounds_and_the_least_recently_used_made_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(population, "KEPT_CLIENTS", 2)
    made: list[int] = []

    def make(index: int) -> tuple[Any, Any]:
        made.append(index)
        return index, index

    clients = Population(3, make, cohort=1)
    for name in ("client-0", "client-1", "client-0", "client-2", "client-0", "client-1"):
        assert clients.data(name) == (int(name[-1]), int(name[-1]))
    assert made == [0, 1, 2, 1]


def test_all_of_a_small_population_are_kept_and_two_cohorts_of_a_large_one():
    assert Population(4096, lambda index: (index, index), cohort=10).most_kept == 4096
    assert Population(100_000, lambda index: (index, index), cohort=1000).most_kept == 2000
    assert Population(100_000, lambda index: (index, index), cohort=9999).most_kept == 4096


def failing(site: Site) -> Any:
    raise OSError("no such file")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (failing, r"client-0: data\(site\) failed: OSError: no such file"),
        (lambda site: None, r"client-0: data\(site\) failed: TypeError"),
        (lambda site: ([], [], []), r"client-0: data\(site\) failed: ValueError"),
    ],
)
def test_data_that_cannot_be_had_names_the_client(data: Callable[[Site], Any], says: str):
    with pytest.raises(TaskError, match=says):
        population_of(data, 2).data("client-0")


def test_more_clients_than_examples_and_an_empty_set_are_refused_at_once():
    with pytest.raises(ConfigError, match=r"found 30: lower \[simulation\] clients"):
        population_of(whole, TRAIN + 1, partition="iid")
    with pytest.raises(TaskError, match="at least one example"):
        population_of(lambda site: (whole(site)[0], []), 2, partition="iid")


class Named(Dataset):  # type: ignore[type-arg]  # its items are what is looked at
    """A dataset of a user's, without tensors to look into."""

    def __init__(self, targets: list[Any]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[float, Any]:
        return 0.0, self.targets[index]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(3, 1), torch.tensor([2, 0, 1])),
        TensorDataset(torch.zeros(3, 1), torch.tensor([2, 0, 1], dtype=torch.uint8)),
        Subset(TensorDataset(torch.zeros(5, 1), torch.tensor([9, 2, 0, 1, 9])), [1, 2, 3]),
        Named([2, 0, 1]),
        Named([torch.tensor(2), torch.tensor(0), torch.tensor(1)]),
        Named([np.int8(2), np.int8(0), np.int8(1)]),
    ],
)
def test_the_classes_of_any_dataset_are_found(dataset: Any):
    labels = labels_of(dataset, 3)
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(3, 1), torch.zeros(3)),
        TensorDataset(torch.zeros(3, 1), torch.zeros(3, 2, dtype=torch.int64)),
        Named([0.5, 1.5, 2.5]),
        Named([[1], [1, 2], [3]]),
        Named([[1, 2, 3], [1, 2, 3], [1, 2, 3]]),
        Named(["a", "b", "c"]),
    ],
    ids=["floats", "rows", "numbers", "ragged", "lists", "text"],
)
def test_targets_that_are_no_classes_are_refused_with_what_to_do(dataset: Any):
    with pytest.raises(ConfigError, match="divides by class and needs integer targets"):
        labels_of(dataset, 3)


def test_a_dataset_that_cannot_be_read_is_the_tasks_error():
    with pytest.raises(TaskError, match="the targets cannot be read: IndexError"):
        labels_of(Named([1, 2]), 3)


# Natural ids, and what differs from client to client.


class Diary(TensorDataset):
    """Examples of several people."""

    groups = np.array(["ann", "bob", "ann", "cem", "bob", "ann"])


def test_natural_clients_are_those_whose_ids_the_data_has():
    inputs, labels = torch.arange(6.0)[:, None], torch.zeros(6, dtype=torch.int64)
    clients = population_of(
        lambda site: (Diary(inputs, labels), TensorDataset(inputs, labels)), 3, partition="groups"
    )
    found = {tuple(numbers(clients.data(name)[0])) for name in clients.names}
    assert found == {(0, 2, 5), (1, 4), (3,)}


def test_natural_clients_need_ids():
    with pytest.raises(ConfigError, match="attribute `groups`"):
        population_of(whole, 3, partition="groups")

    class Short(TensorDataset):
        groups = (1, 2)

    inputs = torch.zeros(3, 1)
    with pytest.raises(ConfigError, match="expected 3 natural ids"):
        population_of(lambda site: (Short(inputs, inputs), Short(inputs, inputs)), 2, partition="groups")


@pytest.mark.parametrize("partition", ["task", "iid"])
def test_each_clients_features_are_scaled_and_shifted_in_its_own_way_in_training_and_judging(partition: str):
    plain = population_of(whole, 3, partition=partition)
    skewed = population_of(whole, 3, partition=partition, feature_skew=0.5)
    ways = []
    for name in plain.names:
        pairs = [
            (float(before[0]), float(after[0]))
            for own, other in zip(plain.data(name), skewed.data(name), strict=True)
            for (before, _), (after, _) in ((own[at], other[at]) for at in range(len(own)))
        ]
        scale, shift = np.polyfit(*zip(*pairs, strict=True), 1)
        assert [scale * before + shift for before, _ in pairs] == pytest.approx(
            [after for _, after in pairs], abs=1e-3
        )
        ways.append((round(float(scale), 3), round(float(shift), 2)))
    assert len(set(ways)) == 3
    again = population_of(whole, 3, partition=partition, feature_skew=0.5)
    assert numbers(again.data("client-1")[0]) == numbers(skewed.data("client-1")[0])


def test_a_share_of_training_labels_is_another_class_and_no_test_label_is():
    def many(site: Site) -> tuple[Any, Any]:
        labels = torch.arange(4000) % 4
        return TensorDataset(labels.float()[:, None], labels), TensorDataset(labels.float()[:, None], labels)

    clients = population_of(many, 2, label_noise=0.3)
    for name in clients.names:
        train, test = clients.data(name)
        inputs, labels = train.tensors
        wrong = inputs[:, 0] != labels
        assert float(wrong.float().mean()) == pytest.approx(0.3, abs=0.04)
        for label in range(4):  # and each of the others is as likely
            counts = torch.bincount(labels[(inputs[:, 0] == label) & wrong], minlength=4)
            assert counts[label] == 0
            assert counts.max() < 1.5 * counts[counts > 0].min()
        assert (test.tensors[0][:, 0] == test.tensors[1]).all()
    first, second = (clients.data(name)[0].tensors[1] for name in clients.names)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("data", "simulation", "says"),
    [
        (lambda site: ([(1, 0)], [(1, 0)]), {"feature_skew": 0.1}, "floating-point tensors"),
        (lambda site: ([("a", 0)], [("a", 0)]), {"feature_skew": 0.1}, "one shape"),
        (lambda site: ([(1.0, 0.5)], [(1.0, 0.5)]), {"label_noise": 0.1}, "whole numbers as labels"),
    ],
    ids=["whole numbers", "texts", "no classes"],
)
def test_data_that_cannot_be_changed_so_is_refused(data, simulation, says):
    with pytest.raises(ConfigError, match=says):
        population_of(data, 1, **simulation).data("client-0")


def test_data_that_is_no_tensor_is_changed_too():
    def listed(site: Site) -> tuple[Any, Any]:
        return [(np.array([1.0, 2.0], np.float32), 0), (np.array([3.0, 4.0], np.float32), 1)], [
            ([1.0, 2.0], 0)
        ]

    train, test = population_of(listed, 1, feature_skew=0.3, label_noise=0.5).data("client-0")
    assert len(train) == 2
    assert torch.allclose(train[0][0][1] - train[0][0][0], train[1][0][1] - train[1][0][0])
    assert torch.allclose(test[0][0], train[0][0])
