"""Data as batches: seeded epochs of positions, and the fastest way to gather each kind of dataset.

No DataLoader: a simulated client with twenty rows must cost microseconds. Messages name types and
shapes, never a value: they leave the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset, default_collate

from fedge.errors import TaskError
from fedge.seeds import mixed, stream

_MIN_ROWS = 16


def examples(dataset: Any) -> int:
    """How many examples a map-style dataset has.

    Raises:
        TaskError: it has no length, is a stream, or is empty.
    """
    if isinstance(dataset, IterableDataset):
        raise TaskError(
            f"expected a map-style dataset (len() and indexing), found the stream {type(dataset).__name__}; "
            "read it into a list or a TensorDataset"
        )
    try:
        size = len(dataset)
    except Exception as error:  # a user's __len__ may raise anything
        raise TaskError(
            f"expected a map-style dataset with a length, found a {type(dataset).__name__} "
            f"whose len() raises {type(error).__name__}; implement __len__"
        ) from error
    if size == 0:
        raise TaskError(
            f"expected at least one example, found an empty {type(dataset).__name__}; check the site's data"
        )
    return size


class Order:
    """Seeded permutations of 0..size-1. The last one is kept: every step of an epoch asks for it."""

    def __init__(self) -> None:
        self._key = (-1, -1, -1)
        self._last = torch.empty(0, dtype=torch.int64)

    def permutation(self, size: int, *, seed: int, epoch: int) -> torch.Tensor:
        """A random permutation as int64[size]: a function of its arguments, whatever was asked before."""
        if self._key != (size, seed, epoch):
            self._last = permutations(size, seeds=[seed], epoch=epoch)[0]
            self._key = (size, seed, epoch)
        return self._last


def permutations(size: int, *, seeds: Sequence[int], epoch: int) -> torch.Tensor:
    """Those of several seeds, int64[seeds, size]: each as `Order.permutation` has it.

    The order of random numbers, since many seeds' are drawn and sorted at once.
    """
    keys = mixed(np.array(seeds, np.uint64), epoch)
    return torch.from_numpy(np.argsort(stream(keys, size), axis=1, kind="stable"))


class Batches:
    """A dataset of `(input, target)` pairs in batches of `batch_size`, the epoch's last one may be smaller.

    Raises:
        TaskError: see `examples`, or the dataset is a TensorDataset of other than two tensors.
    """

    def __init__(
        self, dataset: Any, batch_size: int | Literal["full"], *, order: Order | None = None
    ) -> None:
        self.size = examples(dataset)
        self.batch_size = self.size if batch_size == "full" else min(batch_size, self.size)
        self.per_epoch = -(-self.size // self.batch_size)
        self._dataset = dataset
        self._order = order or Order()
        self._levels, self._tensors = _tensors_of(dataset)

    def step(self, number: int, *, seed: int) -> torch.Tensor:
        """The positions (int64[n]) of the batch of step `number`, counted from 0 across epochs.

        Each epoch is a permutation by `(seed, epoch)`, so any step can be had without those before it.
        """
        epoch, at = divmod(number, self.per_epoch)
        shuffled = self._order.permutation(self.size, seed=seed, epoch=epoch)
        return shuffled[at * self.batch_size : (at + 1) * self.batch_size]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where all examples are rows of an input and a target tensor: these. `rows` says which are the dataset's."""
        return self._tensors

    @property
    def whole(self) -> bool:
        """Whether the rows of `tensors` are the dataset's examples, in its order."""
        return not self._levels

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What the examples in `tensors` have in common: shapes and types of an input and a target."""
        assert self._tensors is not None  # else nothing is known of them
        inputs, targets = self._tensors
        return inputs.shape[1:], inputs.dtype, targets.shape[1:], targets.dtype

    @cached_property
    def rows(self) -> torch.Tensor:
        """The row of each example in `tensors`: int64[size], from 0.

        Raises:
            TaskError: the indices of a Subset are none.
        """
        if not self._levels:
            return torch.arange(self.size)
        assert self._tensors is not None  # only of those are levels known
        return self._rows(list(range(self.size))) % len(self._tensors[0])

    def in_order(self, *, max_bytes: int) -> tuple[torch.Tensor, ...]:
        """The positions of batches in the dataset's own order, each of about `max_bytes` or fewer."""
        rows = max(_MIN_ROWS, max_bytes // max(1, self.bytes_per_example()))
        return torch.split(torch.arange(self.size), min(rows, self.batch_size))

    def gather(self, positions: torch.Tensor) -> tuple[Any, Any]:
        """The batch of examples at `positions` (int64[n]), as `(input, target)` in memory of its own.

        Raises:
            TaskError: an example cannot be read, or the examples do not form pairs or batches.
        """
        if self._tensors is None:
            return self._collated(positions.tolist())
        inputs, targets = self._tensors
        if not self._levels:
            return inputs.index_select(0, positions), targets.index_select(0, positions)
        rows = self._rows(positions.tolist())
        return inputs[rows], targets[rows]

    def check_distinct(self) -> None:
        """Refuse a Subset that holds an example more than once: what protects one would protect each copy alone.

        Raises:
            TaskError: it does.
        """
        for indices in self._levels:
            listed = list(map(int, indices))
            if len(set(listed)) != len(listed):
                raise TaskError(
                    "expected each example once under example-level privacy, found a Subset with an index that "
                    "comes again: leave it out, and give rare examples more weight in the loss instead"
                )

    def bytes_per_example(self) -> int:
        """The memory of the first example, as it is once gathered."""
        if self._tensors is not None:
            return sum(tensor[:1].nbytes for tensor in self._tensors)
        return _nbytes(self.gather(torch.zeros(1, dtype=torch.int64)))

    def _rows(self, positions: list[int]) -> torch.Tensor:
        """Positions in nested subsets as rows of the tensors beneath; only those asked for are looked up."""
        assert self._tensors is not None
        count = len(self._tensors[0])
        try:
            for indices in self._levels:
                if isinstance(indices, torch.Tensor | np.ndarray):
                    positions = indices[positions].tolist()
                else:
                    positions = [indices[at] for at in positions]
            rows = torch.tensor(positions, dtype=torch.int64)
        except Exception as error:  # indices are the user's: a list, a range, an array or anything else
            raise TaskError(
                f"expected integers as the indices of a Subset, found what raises {type(error).__name__}"
            ) from error
        if rows.min() < -count or rows.max() >= count:
            raise TaskError(
                f"expected indices of a Subset below {count}, the size of its dataset; found one outside"
            )
        return rows

    def _collated(self, positions: list[int]) -> tuple[Any, Any]:
        dataset, kind = self._dataset, type(self._dataset).__name__
        try:
            if callable(getattr(dataset, "__getitems__", None)):
                items = list(dataset.__getitems__(positions))
            else:
                items = [dataset[at] for at in positions]
        except Exception as error:  # user code; its text may hold data, so only the type is told
            raise TaskError(
                f"cannot read examples from the {kind}: it raised {type(error).__name__}"
            ) from error
        if len(items) != len(positions):
            raise TaskError(
                f"expected {len(positions)} examples from {kind}.__getitems__, found {len(items)}"
            )
        for item in items:
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise TaskError(
                    f"expected each example of the {kind} to be (input, target), found {describe(item)}"
                )
        try:
            inputs, targets = default_collate(items)
        except Exception as error:
            raise TaskError(
                f"cannot make a batch of examples of the {kind}: {_mismatch(items)} ({type(error).__name__})"
            ) from error
        return inputs, targets


def describe(value: Any) -> str:
    """What a value is, by type and shape, without its content."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{type(value).__name__} of {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        shown = ", ".join(describe(part) for part in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"{type(value).__name__} of {len(value)} ({shown})"
    return f"{type(value).__name__}"


def joined(parts: list[Any]) -> Any:
    """Batches as one: tensors are concatenated, tuples, lists and dicts of them element by element.

    Raises:
        TaskError: they have no batch dimension, or differ in the others.
    """
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, dict):
        columns = {key: joined([part[key] for part in parts]) for key in first}
        return columns if type(first) is dict else type(first)(**columns)
    if isinstance(first, tuple | list):
        rows = [joined(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*rows) if hasattr(first, "_fields") else type(first)(rows)
    if not isinstance(first, torch.Tensor) or not first.ndim:
        raise TaskError(f"expected outputs and targets with a batch dimension, found {describe(first)}")
    try:
        return torch.cat(parts)
    except RuntimeError as error:
        raise TaskError(f"cannot join the batches of a test set: {_mismatch(parts)}") from error


def _mismatch(items: list[Any]) -> str:
    first = describe(items[0])
    other = next((shown for shown in map(describe, items) if shown != first), None)
    if other is None:
        return f"expected numbers or tensors of one shape, found {first}"
    return f"expected one shape for all, found {first} and {other}"


def _tensors_of(dataset: Any) -> tuple[list[Any], tuple[torch.Tensor, torch.Tensor] | None]:
    """The indices of nested Subsets, outermost first, and the tensors beneath; (_, None) if none are."""
    levels = []
    # Exact types: a subclass may read its items in its own way.
    while type(dataset) is Subset:
        levels.append(dataset.indices)
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return [], None
    if len(dataset.tensors) != 2:
        raise TaskError(f"expected a TensorDataset of input and target, found {len(dataset.tensors)} tensors")
    inputs, targets = (each.detach() if each.requires_grad else each for each in dataset.tensors)
    return levels, (inputs, targets)


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return sum(_nbytes(part) for part in value)
    return 0
