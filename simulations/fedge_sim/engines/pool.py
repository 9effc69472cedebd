"""The examples of a stack of clients, a batch of each at a time.

Where they all lie in plain tensors (as most do that were partitioned, or are small), they are brought together once,
and a step's batches are one selection of rows. Else each client's batch is gathered as the loop gathers it.

Clients may have different numbers of examples, and of steps: those with the most steps come first, so that at each
step those who are still at it are the first so many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedge_client.torch.batches import Batches, permutations
from fedge_client.torch.private.steps import Private
from fedge_sim.engines.crew import UnsuitedError

MAX_POOL_BYTES: int = 1 << 26
"""Of examples that are brought together: more are gathered from where they are."""

MAX_PLACES: int = 1 << 22
"""Of all batches of a stack, known at once."""


Pair = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets."""


@dataclass(frozen=True, eq=False)
class Filled:
    """A step's batches: inputs [clients, width, ...], targets [clients, width, ...], and what each row weighs (0 or 1),
    float32[clients, width]. Behind the members are clients that nobody asked."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A member's: its batches, the seed of their order, how many steps it makes, what it does for the privacy of its
    examples, which then come in samples and not in batches, what corrects its gradients, and the model that it begins
    with where each has its own, float32[size] both."""

    batches: Batches
    seed: int
    steps: int
    private: Private | None = None
    correction: torch.Tensor | None = None
    start: torch.Tensor | None = None

    def size_at(self, step: int) -> int:
        """Examples of a step's batch."""
        batches, at = self.batches, step % self.batches.per_epoch
        return min(batches.batch_size, batches.size - at * batches.batch_size)


class Filler(Protocol):
    """Where a step's batches come from. What it returns may be overwritten by the next."""

    def fill(self, step: int, clients: int) -> Filled:
        """Those of the first `clients`, who include all that make this step."""
        ...


class Shelf:
    """Where batches are needed, and the tensors there whose rows all clients' examples are, once they were brought."""

    def __init__(self, device: torch.device, *, most_bytes: int | None = None) -> None:
        """At most `most_bytes` are brought at once; without it any number, as it need not be where they lie already."""
        self.device, self._most_bytes = device, most_bytes
        self._from: Pair | None = None
        self._changes = (0, 0)
        self._brought: Pair | None = None

    def brought(self, pair: Pair) -> Pair | None:
        """Inputs and targets, there: those of the last time are kept. None if they are too large."""
        inputs, targets = pair
        if inputs.device == targets.device == self.device:
            return pair
        if self._most_bytes is not None and inputs.nbytes + targets.nbytes > self._most_bytes:
            return None
        changes = inputs._version, targets._version  # a task may write to what it has given
        same = self._from is not None and self._from[0] is inputs and self._from[1] is targets
        if not same or changes != self._changes:
            self._from = self._brought = None  # before others take its place
            self._brought = inputs.to(self.device), targets.to(self.device)
            self._from, self._changes = pair, changes
        return self._brought


def filler(parts: Sequence[Part], count: int, shelf: Shelf) -> Filler:
    """Of these members, in a stack of `count` clients.

    Raises:
        UnsuitedError: their examples are of several shapes or types, or no tensors.
    """
    return _Pool.of(parts, count, shelf) or Gathered(parts, count, shelf.device)


def gathered(parts: Sequence[Part], count: int, shelf: Shelf) -> Filler:
    """Of these members, in a stack of `count` clients, for a few of their steps: nothing is made ahead."""
    return Gathered(parts, count, shelf.device)


def all_alike(parts: Sequence[Part]) -> bool:
    """Whether all have as many examples and make as many steps."""
    first = parts[0]
    size, steps = first.batches.size, first.steps
    return all(part.batches.size == size and part.steps == steps for part in parts)


def _width(parts: Sequence[Part]) -> int:
    return max(part.batches.batch_size for part in parts)


class _Pool:
    """All rows in one tensor, and a table of where each batch's are."""

    def __init__(
        self,
        pair: Pair,
        rows: Sequence[torch.Tensor] | torch.Tensor,
        parts: Sequence[Part],
        count: int,
    ) -> None:
        """`rows[i]` are where member i's examples lie; one tensor where all have as many."""
        self._inputs, self._targets = pair
        steps, width = parts[0].steps, _width(parts)
        self._places = torch.zeros(count, steps, width, dtype=torch.int64)
        self._weights = torch.ones(count, steps, width)
        if all_alike(parts):
            whole = rows if isinstance(rows, torch.Tensor) else torch.stack(list(rows))
            self._fill_in(slice(0, len(parts)), parts, whole)
        else:
            for at, part in enumerate(parts):
                self._fill_in(slice(at, at + 1), [part], rows[at][None])
        device = self._inputs.device
        self._places, self._weights = self._places.to(device), self._weights.to(device)

    def _fill_in(self, members: slice, parts: Sequence[Part], rows: torch.Tensor) -> None:
        """The places of all batches of members with as many examples and steps; `rows` are [members, examples]."""
        width, first = self._places.shape[2], parts[0]
        places = self._places[members].view(len(parts), -1)
        weights = self._weights[members].view(len(parts), -1)
        epoch = first.batches.per_epoch * width
        for number in range(-(-first.steps // first.batches.per_epoch)):
            seeds = [part.seed for part in parts]
            shuffled = rows.gather(1, permutations(first.batches.size, seeds=seeds, epoch=number))
            start, stop = number * epoch, min((number + 1) * epoch, first.steps * width)
            end = min(start + first.batches.size, stop)
            places[:, start:end] = shuffled[:, : end - start]
            if end < stop:  # the epoch's last batch is smaller: something that the model can take
                places[:, end:stop] = shuffled[:, :1]
                weights[:, end:stop] = 0.0

    @classmethod
    def of(cls, parts: Sequence[Part], count: int, shelf: Shelf) -> _Pool | None:
        """None if the examples are not all in plain tensors, or too large together."""
        found = [part.batches.tensors for part in parts]
        tensors = [each for each in found if each is not None]
        if len(tensors) < len(found) or count * parts[0].steps * _width(parts) > MAX_PLACES:
            return None
        inputs, targets = tensors[0]
        if all(one is inputs and other is targets for one, other in tensors):
            pair = shelf.brought((inputs, targets))
            return (
                cls(pair, [part.batches.rows for part in parts], parts, count) if pair is not None else None
            )
        sizes = [part.batches.size for part in parts]
        if sum(sizes) * parts[0].batches.bytes_per_example() > MAX_POOL_BYTES:
            return None
        if len({part.batches.kind for part in parts}) > 1:
            raise UnsuitedError("its examples are of several shapes or types")
        own = [
            pair if part.batches.whole else (pair[0][part.batches.rows], pair[1][part.batches.rows])
            for pair, part in zip(tensors, parts, strict=True)
        ]
        numbers = torch.arange(sum(sizes))
        alike = len(set(sizes)) == 1
        rows = numbers.view(len(sizes), sizes[0]) if alike else torch.split(numbers, sizes)
        whole = torch.cat([one for one, _ in own]), torch.cat([other for _, other in own])
        return cls((whole[0].to(shelf.device), whole[1].to(shelf.device)), rows, parts, count)

    def fill(self, step: int, clients: int) -> Filled:
        places = self._places[:clients, step]
        shape, flat = places.shape, places.reshape(-1)
        return Filled(
            self._inputs.index_select(0, flat).view(*shape, *self._inputs.shape[1:]),
            self._targets.index_select(0, flat).view(*shape, *self._targets.shape[1:]),
            self._weights[:clients, step].contiguous(),
        )


class Gathered:
    """Each member's batch, one after the other: of at most `width` examples, as many as a batch has unless given."""

    def __init__(
        self, parts: Sequence[Part], count: int, device: torch.device, width: int | None = None
    ) -> None:
        self._parts, self._count, self._width = parts, count, width or _width(parts)
        self._weights = torch.ones(count, self._width)
        self._room: Pair | None = None
        self._device = device

    def fill(self, step: int, clients: int) -> Filled:
        at_it = (part for part in self._parts if step < part.steps)
        return self.place([part.batches.step(step, seed=part.seed) for part in at_it], clients)

    def place(self, positions: Sequence[torch.Tensor], clients: int) -> Filled:
        """The examples at these positions (int64[n]) of the first members, in a stack of `clients`."""
        for at, (part, some) in enumerate(zip(self._parts, positions, strict=False)):
            size = len(some)
            self._weights[at, :size], self._weights[at, size:] = 1.0, 0.0
            if not size and self._room is not None:
                continue  # with what was there, which weighs nothing
            inputs, targets = part.batches.gather(some if size else torch.zeros(1, dtype=torch.int64))
            if not isinstance(inputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
                raise UnsuitedError("its examples are more than one tensor and one target")
            if self._room is None:
                self._room = (
                    inputs.new_zeros((self._count, self._width, *inputs.shape[1:])),
                    targets.new_zeros((self._count, self._width, *targets.shape[1:])),
                )
            for whole, batch in zip(self._room, (inputs, targets), strict=True):
                room = whole[at]
                if (room.shape[1:], room.dtype) != (batch.shape[1:], batch.dtype):
                    raise UnsuitedError("its examples are of several shapes or types")
                room[: len(batch)] = batch
                room[len(batch) :] = batch[:1]  # something that the model can take
        assert self._room is not None  # there are members
        inputs, targets = (each[:clients].to(self._device) for each in self._room)
        return Filled(inputs, targets, self._weights[:clients].to(self._device))
