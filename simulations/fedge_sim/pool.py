"""The examples of a stack of clients, a batch of each at a time.

Where they all lie in plain tensors (as most do that were partitioned, or are small), they are brought together once,
and a step's batches are one selection of rows. Else each client's batch is gathered as the loop gathers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedge_client.torch.batches import Batches

MAX_POOL_BYTES: int = 1 << 26
"""Of examples that are brought together: more are gathered from where they are."""


class UnsuitedError(Exception):
    """A task that cannot be trained as a stack, and why, for the person who asked for it."""


@dataclass(frozen=True, eq=False)
class Filled:
    """A step's batches: inputs [clients, width, ...], targets [clients, width, ...], and what each row weighs (0 or 1),
    float32[clients, width]. `sizes` are those of the members; behind them are clients that nobody asked."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    sizes: Sequence[int]


class Filler(Protocol):
    """Where a step's batches come from. What it returns is overwritten by the next."""

    def fill(self, step: int) -> Filled: ...


def filler(batches: Sequence[Batches], seeds: Sequence[int], count: int) -> Filler:
    """Of these members, in a stack of `count` clients.

    Raises:
        UnsuitedError: their examples are of several shapes or types, or no tensors.
    """
    return _Pool.of(batches, seeds, count) or _Gathered(batches, seeds, count)


class _Pool:
    """All rows in one tensor; for members with as many examples each, an epoch's places are known at once."""

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        places: torch.Tensor,
        batches: Sequence[Batches],
        seeds: Sequence[int],
        count: int,
    ) -> None:
        """`places[i]` are the rows of member i's examples."""
        self._inputs, self._targets = inputs, targets
        self._batches, self._seeds = batches, seeds
        self._places = places
        self._size, self._width = batches[0].size, batches[0].batch_size
        self._per_epoch = batches[0].per_epoch
        self._rows = torch.zeros(count, self._per_epoch * self._width, dtype=torch.int64)
        self._weights = torch.ones(count, self._width)
        self._epoch = -1

    @classmethod
    def of(cls, batches: Sequence[Batches], seeds: Sequence[int], count: int) -> _Pool | None:
        """None unless the members have as many examples each, in plain tensors that are not too large together."""
        first = batches[0]
        if any((each.size, each.batch_size) != (first.size, first.batch_size) for each in batches):
            return None
        found = [each.tensors for each in batches]
        tensors = [each for each in found if each is not None]
        if len(tensors) < len(found):
            return None
        inputs, targets = tensors[0]
        if all(one is inputs and other is targets for one, other in tensors):
            return cls(inputs, targets, torch.stack([each.rows for each in batches]), batches, seeds, count)
        if len(batches) * first.size * first.bytes_per_example() > MAX_POOL_BYTES:
            return None
        shapes = {(one.shape[1:], one.dtype, other.shape[1:], other.dtype) for one, other in tensors}
        if len(shapes) > 1:
            raise UnsuitedError("its examples are of several shapes or types")
        own = [
            pair if each.whole else (pair[0][each.rows], pair[1][each.rows])
            for pair, each in zip(tensors, batches, strict=True)
        ]
        whole = torch.arange(len(batches) * first.size).view(len(batches), first.size)
        return cls(
            torch.cat([one for one, _ in own]),
            torch.cat([other for _, other in own]),
            whole,
            batches,
            seeds,
            count,
        )

    def fill(self, step: int) -> Filled:
        epoch, at = divmod(step, self._per_epoch)
        number = len(self._batches)
        if epoch != self._epoch:
            shuffled = torch.stack(
                [each.epoch(epoch, seed=seed) for each, seed in zip(self._batches, self._seeds, strict=True)]
            )
            self._rows[:number, : self._size] = self._places.gather(1, shuffled)
            self._epoch = epoch
        start = at * self._width
        size = min(self._width, self._size - start)
        rows = self._rows[:, start : start + self._width]
        if size < self._width:
            rows[:, size:] = rows[:, :1]  # something that the model can take
        self._weights[:number, size:] = 0.0
        self._weights[:number, :size] = 1.0
        flat = rows.reshape(-1)
        shape = rows.shape
        return Filled(
            self._inputs.index_select(0, flat).view(*shape, *self._inputs.shape[1:]),
            self._targets.index_select(0, flat).view(*shape, *self._targets.shape[1:]),
            self._weights,
            [size] * number,
        )


class _Gathered:
    """Each member's batch, one after the other."""

    def __init__(self, batches: Sequence[Batches], seeds: Sequence[int], count: int) -> None:
        self._batches, self._seeds, self._count = batches, seeds, count
        self._width = max(each.batch_size for each in batches)
        self._weights = torch.ones(count, self._width)
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def fill(self, step: int) -> Filled:
        sizes = []
        for at, (batches, seed) in enumerate(zip(self._batches, self._seeds, strict=True)):
            inputs, targets = batches.gather(batches.step(step, seed=seed))
            if not isinstance(inputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
                raise UnsuitedError("its examples are more than one tensor and one target")
            if self._room is None:
                self._room = (
                    inputs.new_zeros((self._count, self._width, *inputs.shape[1:])),
                    targets.new_zeros((self._count, self._width, *targets.shape[1:])),
                )
            size = len(inputs)
            for whole, batch in zip(self._room, (inputs, targets), strict=True):
                room = whole[at]
                if (room.shape[1:], room.dtype) != (batch.shape[1:], batch.dtype):
                    raise UnsuitedError("its examples are of several shapes or types")
                room[:size] = batch
                if size < self._width:
                    room[size:] = batch[:1]  # something that the model can take
            self._weights[at, :size], self._weights[at, size:] = 1.0, 0.0
            sizes.append(size)
        assert self._room is not None  # there are members
        return Filled(*self._room, self._weights, sizes)
