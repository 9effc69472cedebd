"""Batches are what a DataLoader would give, without one."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from fedge.errors import TaskError
from fedge_client.torch.batches import Batches, Order, describe, examples, joined, permutations

SEEDS = st.integers(0, 2**63 - 1)


def tensors(size: int = 12) -> TensorDataset:
    return TensorDataset(torch.arange(size * 2.0).view(size, 2), torch.arange(size))


class Rows(Dataset[Any]):
    """One example at a time, whatever `example` makes of its index."""

    def __init__(self, size: int, example: Callable[[int], Any]) -> None:
        self.size, self.example = size, example

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.example(index)


class Many(Rows):
    """Several examples at a time, and never one."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("__getitems__ is there to be used")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.example(index) for index in indices]


class Doubled(TensorDataset):
    """Reads its tensors in a way of its own."""

    def __getitem__(self, index: int) -> Any:
        return tuple(2 * tensor[index] for tensor in self.tensors)


def pair(index: int) -> tuple[Any, Any]:
    return np.full(3, index, np.float32), index


DATASETS: dict[str, Callable[[], Any]] = {
    "tensors": tensors,
    "subset by list": lambda: Subset(tensors(20), [3, 1, 4, 19, 5, 9, 2, 6, 0, 7, 8, 10]),
    "subset by range": lambda: Subset(tensors(20), range(8, 20)),
    "subset by array": lambda: Subset(tensors(20), np.arange(19, 7, -1)),
    "subset by tensor": lambda: Subset(tensors(20), torch.arange(12)),
    "subset from the end": lambda: Subset(tensors(20), [-1, -20, 3] * 4),
    "nested subsets": lambda: Subset(Subset(tensors(40), list(range(0, 40, 2))), np.arange(4, 16)),
    "subset of rows": lambda: Subset(Rows(20, pair), list(range(5, 17))),
    "a subclass of TensorDataset": lambda: Doubled(*tensors().tensors),
    "rows": lambda: Rows(12, pair),
    "__getitems__": lambda: Many(12, pair),
    "a plain list": lambda: [pair(index) for index in range(12)],
    "several inputs": lambda: Rows(12, lambda i: ((torch.ones(2) * i, torch.tensor(i)), i)),
    "named inputs": lambda: Rows(12, lambda i: ({"x": torch.ones(2) * i, "y": i}, i)),
    "concatenated": lambda: ConcatDataset([tensors(5), tensors(7)]),
}

every_dataset = pytest.mark.parametrize("make", DATASETS.values(), ids=DATASETS.keys())


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif found is not None:
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@every_dataset
def test_a_gathered_batch_is_what_a_data_loader_collates(make: Callable[[], Any]) -> None:
    positions = [7, 0, 11, 3]
    (expected,) = DataLoader(make(), batch_sampler=[positions])
    found = Batches(make(), 4).gather(torch.tensor(positions))
    assert_same(list(found), list(expected))


@every_dataset
def test_a_gathered_batch_may_be_written_to_without_harm_to_the_data(make: Callable[[], Any]) -> None:
    dataset = make()
    if isinstance(dataset, list):
        dataset = [(torch.from_numpy(x), y) for x, y in dataset]
    everything = torch.arange(len(dataset))
    (expected,) = DataLoader(dataset, batch_size=len(dataset))
    inputs, targets = Batches(dataset, "full").gather(everything)
    for tensor in [targets, *([inputs] if isinstance(inputs, torch.Tensor) else [])]:
        tensor.fill_(-1)
    assert_same(list(Batches(dataset, "full").gather(everything)), list(expected))


@pytest.mark.parametrize("name", [name for name in DATASETS if "subset" in name or name == "tensors"])
def test_tensors_are_never_read_row_by_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dataset: Any, index: int) -> Any:
        raise AssertionError("a TensorDataset is indexed as a whole")

    monkeypatch.setattr(TensorDataset, "__getitem__", refuse)
    assert len(Batches(DATASETS[name](), 4).gather(torch.tensor([7, 0, 11]))[0]) == 3


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 50) | st.just("full"), st.integers(0, 3), SEEDS)
def test_the_steps_of_an_epoch_visit_every_example_once_and_only_the_last_batch_is_smaller(
    size: int, batch_size: int, epoch: int, seed: int
) -> None:
    batches = Batches([(0, 0)] * size, batch_size)
    parts = [
        batches.step(epoch * batches.per_epoch + at, seed=seed).tolist() for at in range(batches.per_epoch)
    ]
    assert sorted(chain(*parts)) == list(range(size))
    assert {len(part) for part in parts[:-1]} <= {batches.batch_size}
    assert 0 < len(parts[-1]) <= batches.batch_size


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), SEEDS, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_step_is_a_function_of_its_number_and_seed_whatever_was_asked_before(
    size: int, batch_size: int, seed: int, numbers: list[int]
) -> None:
    used = Batches([(0, 0)] * size, batch_size, order=Order())
    for number in numbers:
        fresh = Batches([(0, 0)] * size, batch_size)
        assert used.step(number, seed=seed).tolist() == fresh.step(number, seed=seed).tolist()


def test_epochs_and_seeds_are_permuted_differently() -> None:
    order = Order()
    keys = [(1, 0), (1, 1), (2, 0), (1, 0)]
    seen = [tuple(order.permutation(50, seed=seed, epoch=epoch).tolist()) for seed, epoch in keys]
    assert len(set(seen)) == 3
    assert seen[0] == seen[3]


@given(st.integers(1, 30), st.lists(SEEDS, min_size=1, max_size=5), st.integers(0, 3))
def test_permutations_of_several_seeds_are_those_of_each(size: int, seeds: list[int], epoch: int) -> None:
    together = permutations(size, seeds=seeds, epoch=epoch)
    alone = [Order().permutation(size, seed=seed, epoch=epoch) for seed in seeds]
    assert together.tolist() == [each.tolist() for each in alone]


def test_shuffling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Batches(tensors(), 4).step(5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("columns", "largest"), [(1, 1024), (8, 1024), (1 << 10, 32), (1 << 18, 16)])
def test_batches_in_order_cover_the_set_within_the_memory_they_are_given(columns: int, largest: int) -> None:
    dataset = TensorDataset(torch.zeros(1, columns).expand(2000, -1), torch.zeros(1).expand(2000))
    parts = Batches(dataset, 1024).in_order(max_bytes=1 << 17)
    assert torch.cat(parts).tolist() == list(range(2000))
    assert max(map(len, parts)) == pytest.approx(largest, abs=1)


@pytest.mark.parametrize(
    ("make", "size"),
    [(lambda i: ({"x": torch.ones(3), "y": [torch.ones(2), torch.ones(1)]}, 1), 32), (pair, 20)],
)
def test_an_example_is_measured_through_any_structure(make: Callable[[int], Any], size: int) -> None:
    assert Batches(Rows(3, make), 2).bytes_per_example() == size


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([pair(0)])

    def __len__(self) -> int:
        return 5


class Unsized:
    def __getitem__(self, index: int) -> Any:
        return pair(index)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "empty list"),
        (TensorDataset(torch.zeros(0, 3), torch.zeros(0)), "empty TensorDataset"),
        (Unsized(), "Unsized.*TypeError.*__len__"),
        (None, "NoneType"),
        (Stream(), "stream Stream"),
    ],
)
def test_a_dataset_that_cannot_be_counted_is_the_tasks_error(dataset: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        examples(dataset)


def failing(index: int) -> Any:
    raise KeyError("patient 4711")


def ragged(index: int) -> Any:
    return torch.full((index + 1,), 4711.0), 0


UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (lambda: Rows(3, failing), "Rows.*KeyError"),
    "__getitems__ raises": (lambda: Many(3, failing), "Many.*KeyError"),
    "not a pair": (
        lambda: Rows(3, lambda i: torch.full((2,), 4711.0)),
        r"\(input, target\).*Tensor of float32\[2\]",
    ),
    "a triple": (lambda: Rows(3, lambda i: (4711, 1, 2)), "tuple of 3"),
    "a dict": (lambda: Rows(3, lambda i: {"x": 4711, "y": 1}), "dict"),
    "ragged": (lambda: Rows(3, ragged), r"float32\[1\].*float32\[2\]"),
    "objects": (lambda: Rows(3, lambda i: (object(), 4711)), "object"),
    "one tensor": (lambda: TensorDataset(torch.full((3, 2), 4711.0)), "1 tensors"),
    "index too large": (lambda: Subset(tensors(5), [0, 1, 4711]), "below 5"),
    "index too small": (lambda: Subset(tensors(5), [0, 1, -4711]), "below 5"),
    "index of text": (lambda: Subset(tensors(5), ["4711"] * 3), "indices.*ValueError|indices.*TypeError"),  # type: ignore[list-item]
}


@pytest.mark.parametrize(("make", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_error_in_the_data_names_types_and_shapes_and_no_value(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        Batches(make(), 3).gather(torch.arange(3))
    assert "4711" not in str(caught.value)


def test_too_few_examples_from_getitems_are_noticed() -> None:
    class Short(Many):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return super().__getitems__(indices)[1:]

    with pytest.raises(TaskError, match=r"3 examples.*found 2"):
        Batches(Short(3, pair), 3).gather(torch.arange(3))


Named = namedtuple("Named", ["logits", "hidden"])


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_joining_is_the_inverse_of_splitting_in_any_structure(sizes: list[int]) -> None:
    whole = torch.arange(float(sum(sizes) * 2)).view(-1, 2)
    shapes: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t,
        lambda t: [t, t + 1],
        lambda t: (t, None),
        lambda t: {"a": t, "b": (t, t)},
        lambda t: Named(t, [t]),
    ]
    for shape in shapes:
        assert_same(joined([shape(part) for part in whole.split(sizes)]), shape(whole))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.tensor(1.0)] * 2, "batch dimension"),
        (["a", "b"], "batch dimension.*str"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"\[2, 3\].*\[2, 4\]"),
    ],
)
def test_batches_that_cannot_be_joined_are_the_tasks_error(parts: list[Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        joined(parts)


def test_a_description_shows_types_and_shapes_alone() -> None:
    assert describe((torch.zeros(2, 3), np.zeros(4), "secret", 5)) == (
        "tuple of 4 (Tensor of float32[2, 3], ndarray of float64[4], str, int)"
    )
