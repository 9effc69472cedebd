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


def shards(
    labels: npt.NDArray[np.int64], clients: int, *, each: int, generator: np.random.Generator
) -> list[Index]:
    """The pathological partition of McMahan et al. 2017, section 3: the examples, sorted by class, are cut into
    `clients * each` shards of (nearly) one size, of which each client is dealt `each`, so that it has few classes.

    Raises:
        ConfigError: there are fewer examples than shards.
    """
    count = clients * each
    if len(labels) < count:
        raise ConfigError(
            f"simulation.shards_per_client: expected at least one example for each of {clients} x {each} shards, found "
            f"{len(labels)}: lower it, or [simulation] clients"
        )
    shuffled = generator.permutation(
        len(labels)
    )  # so that equal classes are not cut in the data set's own order
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    cut = np.array_split(by_class, count)
    dealt = generator.permutation(count).reshape(clients, each)
    return [np.sort(np.concatenate([cut[shard] for shard in hand])) for hand in dealt]


def quantity(size: int, clients: int, *, alpha: float, generator: np.random.Generator) -> list[Index]:
    """A random partition whose sizes are in proportions drawn from Dirichlet(alpha), at least one each: clients
    that differ in how much they have, and not in what.

    Raises:
        ConfigError: there are fewer examples than clients.
    """
    _check(size, clients)
    shares = generator.dirichlet(np.full(clients, alpha))
    if not np.isfinite(shares).all():  # an alpha so small that all proportions underflowed
        shares = np.eye(clients)[generator.integers(clients)]
    cuts = np.floor(np.cumsum(shares)[:-1] * (size - clients) + 0.5).astype(int)
    sizes = np.diff(np.concatenate([[0], np.clip(cuts, 0, size - clients), [size - clients]])) + 1
    return [np.sort(part) for part in np.split(generator.permutation(size), np.cumsum(sizes)[:-1])]


def groups(ids: npt.NDArray[np.int64], clients: int, *, generator: np.random.Generator) -> list[Index]:
    """Natural clients: the examples of one id, a person or a machine, stay together. With as many ids as clients each
    client is one of them, in a random order; with more, each has several.

    Raises:
        ConfigError: there are fewer ids than clients.
    """
    known = np.unique(ids)
    if len(known) < clients:
        raise ConfigError(
            f"simulation.partition: expected at least one natural id for each of {clients} clients, found "
            f"{len(known)}: lower [simulation] clients"
        )
    dealt = np.array_split(generator.permutation(known), clients)
    return [np.flatnonzero(np.isin(ids, hand)) for hand in dealt]


def time(size: int, clients: int) -> list[Index]:
    """Consecutive parts, nearly equal, of a data set that is in the order of time: each client has a period of its
    own.

    Raises:
        ConfigError: there are fewer examples than clients.
    """
    _check(size, clients)
    return list(np.array_split(np.arange(size), clients))


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
