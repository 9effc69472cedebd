"""How one data set is divided among clients. Pure: labels and a generator in, index arrays out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedge.errors import ConfigError

Index = npt.NDArray[np.int64]

_TRIES = 100


def iid(size: int, clients: int, *, generator: np.random.Generator) -> list[Index]:
    """A random partition of `range(size)` into `clients` parts whose sizes differ by at most one.

    Raises:
        ConfigError: there are fewer examples than clients.
    """
    _check(size, clients)
    return [np.sort(part) for part in np.array_split(generator.permutation(size), clients)]


def dirichlet(
    labels: npt.NDArray[np.int64], clients: int, *, alpha: float, generator: np.random.Generator
) -> list[Index]:
    """A partition in which each class is divided in proportions drawn from Dirichlet(alpha).

    Small `alpha` gives clients of few classes and unequal sizes, large `alpha` tends to IID (Hsu, Qi and
    Brown 2019; class-wise as in Yurochkin et al. 2019). Every client has at least one example: a draw that
    leaves one empty is repeated, and after 100 of them the largest parts give one example each.

    Raises:
        ConfigError: there are fewer examples than clients.
    """
    _check(len(labels), clients)
    for _ in range(_TRIES):
        parts = _draw(labels, clients, alpha, generator)
        if min(map(len, parts)) > 0:
            break
    else:
        parts = _fill_empty(parts)
    return [np.sort(np.asarray(part, np.int64)) for part in parts]


def _draw(
    labels: npt.NDArray[np.int64], clients: int, alpha: float, generator: np.random.Generator
) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, members_of_part in zip(parts, np.split(members, cuts), strict=True):
            part.extend(int(member) for member in members_of_part)
    return parts


def _fill_empty(parts: list[list[int]]) -> list[list[int]]:
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts


def _check(size: int, clients: int) -> None:
    if size < clients:
        raise ConfigError(
            f"simulation: expected at least one example for each of {clients} clients, found {size}: "
            "lower [simulation] clients"
        )
