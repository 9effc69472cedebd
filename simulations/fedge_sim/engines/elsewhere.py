"""Vectors of a cohort that lie on an accelerator: their mean is made there, and they are fetched if looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from fedge.exact import MAX_WEIGHT, mean_of_rows
from fedge.unrounded import MANTISSA_BITS, exponents_apart
from fedge.vector import Array

_MATRIX: Final = 1 << 24
"""Numbers that are made float64 at once."""

_MAGNITUDE: Final = 0x7FFFFFFF

_SPARSE_SHARE: Final = 8


class Fetched:
    """The rows of float32[clients, size], wherever that is: fetched all together when elements of one are asked for.

    Whoever is about to write over the tensor `keep`s them first.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._host: Array | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int, /) -> Row:
        if not 0 <= at < len(self):
            raise IndexError(at)
        return Row(self, at)

    def __iter__(self) -> Iterator[Row]:
        return (self[at] for at in range(len(self)))

    def keep(self) -> Array:
        """All of them in this machine's memory, float32[clients, size]."""
        if self._host is None:
            self._host = self._rows.to("cpu", copy=True).numpy()
        return self._host

    @property
    def size(self) -> int:
        """Of one."""
        return self._rows.shape[1]


class Row:
    """One of them: `fedge.exact.Values`."""

    def __init__(self, rows: Fetched, at: int) -> None:
        self._rows, self._at = rows, at

    def __len__(self) -> int:
        return self._rows.size

    def __getitem__(self, part: slice, /) -> Array:
        found: Array = self._rows.keep()[self._at][part]
        return found

    @property
    def nbytes(self) -> int:
        return 4 * len(self)


def mean_where_it_lies(rows: torch.Tensor, weights: Sequence[int]) -> Array:
    """What `fedge.exact.mean_of_rows` makes of float32[terms, size], to the bit: float32[size], in this machine's
    memory. Where float64 may round, which is rare, the columns are fetched.

    Raises:
        ValueError: as that.
    """
    count, size = rows.shape
    if len(weights) != count or not all(1 <= weight < MAX_WEIGHT for weight in weights):
        raise ValueError(f"expected {count} weights in [1, {MAX_WEIGHT}), found {len(weights)}, or others")
    if not rows.numel():
        return mean_of_rows(rows.cpu().numpy(), weights)
    factors = torch.tensor([weights], dtype=torch.float64, device=rows.device)
    total_weight = float(sum(weights))
    columns, apart = max(1, _MATRIX // max(1, count)), exponents_apart(sum(weights))
    parts = [rows[:, start : start + columns] for start in range(0, size, columns)]
    total = torch.cat([torch.mm(factors, part.double()).squeeze(0) for part in parts])
    rounded = torch.cat([~_are_exact(part, apart) for part in parts]).nonzero().squeeze(1)
    mean: Array = total.add_(0.0).div_(total_weight).to(torch.float32).cpu().numpy()
    if len(rounded) * _SPARSE_SHARE > size:
        return mean_of_rows(rows.cpu().numpy(), weights)
    if len(rounded):
        mean[rounded.cpu().numpy()] = mean_of_rows(rows[:, rounded].cpu().numpy(), weights)
    return mean


def _are_exact(rows: torch.Tensor, apart: int) -> torch.Tensor:
    """Which columns' sums are exact in float64 in any order; see `fedge.unrounded`."""
    bits = rows.view(torch.int32) & _MAGNITUDE
    largest = bits.amax(0)
    if apart < 0:
        return largest == 0
    smallest = bits.masked_fill_(bits == 0, _MAGNITUDE).amin(0)
    smallest.masked_fill_(smallest == _MAGNITUDE, 0)  # there are zeros alone
    return largest - smallest <= apart << MANTISSA_BITS
