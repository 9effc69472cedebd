"""Laws of dividing a data set: nothing lost, nothing twice, nobody empty; and what alpha and the seed do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError
from fedge_sim.partition import Index, dirichlet, groups, iid, quantity, shards, time

ALPHAS = st.one_of(
    st.floats(1e-3, 1e3), st.sampled_from([5e-324, 1e-300, 1e-12, 1e12, 1e300, 1.7976931348623157e308])
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(size: int, classes: int, seed: int = 0) -> Index:
    return generator(seed).integers(0, classes, size)


def check_partition(parts: list[Index], size: int, clients: int) -> None:
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    assert min(map(len, parts)) >= 1
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all(), "in the data set's own order"


def unlikeness(parts: list[Index], labels: Index) -> float:
    """How far the clients' shares of the classes are from the whole's, on average."""
    classes = labels.max() + 1
    whole = np.bincount(labels, minlength=classes) / len(labels)
    return float(
        np.mean([np.abs(np.bincount(labels[p], minlength=classes) / len(p) - whole).sum() for p in parts])
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 5))
def test_iid_gives_every_index_to_exactly_one_client_and_everybody_as_many(size, clients, seed):
    if size < clients:
        with pytest.raises(ConfigError, match=f"one example for each of {clients} clients, found {size}"):
            iid(size, clients, generator=generator(seed))
        return
    parts = iid(size, clients, generator=generator(seed))
    check_partition(parts, size, clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(1, 6), ALPHAS, st.integers(0, 3))
def test_dirichlet_gives_every_index_to_exactly_one_client_and_nobody_none(
    size, clients, classes, alpha, seed
):
    labels = labels_of(size, classes, seed)
    if size < clients:
        with pytest.raises(ConfigError, match=f"one example for each of {clients} clients, found {size}"):
            dirichlet(labels, clients, alpha=alpha, generator=generator(seed))
        return
    check_partition(dirichlet(labels, clients, alpha=alpha, generator=generator(seed)), size, clients)


def test_a_smaller_alpha_makes_clients_less_alike():
    labels = labels_of(5000, 10)
    found = [
        np.mean(
            [
                unlikeness(dirichlet(labels, 10, alpha=alpha, generator=generator(seed)), labels)
                for seed in range(5)
            ]
        )
        for alpha in (0.05, 0.3, 1.0, 10.0, 1000.0)
    ]
    assert found == sorted(found, reverse=True)
    even = unlikeness(iid(5000, 10, generator=generator()), labels)
    assert found[-1] < 2 * even, "a large alpha tends to IID"
    assert found[0] > 1.0, "a small one gives clients of few classes"


def test_a_small_alpha_makes_sizes_unequal_and_a_large_one_equal():
    labels = labels_of(5000, 10)
    small, large = (
        [len(part) for part in dirichlet(labels, 10, alpha=alpha, generator=generator())]
        for alpha in (0.05, 1000.0)
    )
    assert max(small) > 5 * min(small)
    assert max(large) < 1.2 * min(large)


def test_the_seed_decides():
    labels = labels_of(300, 5)

    def drawn(seed: int) -> list[list[int]]:
        parts = dirichlet(labels, 7, alpha=0.5, generator=generator(seed))
        return [part.tolist() for part in parts + iid(300, 7, generator=generator(seed))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_classes_may_be_any_whole_numbers():
    labels = np.array([-5, 1000, -5, 1000, 7, 7], np.int64)
    check_partition(dirichlet(labels, 3, alpha=1.0, generator=generator()), 6, 3)


def test_each_class_is_divided_by_a_draw_of_its_own():
    """With one class in play a client's share is a Dirichlet draw: their mean and variance are known."""
    labels, alpha, clients = np.zeros(2000, np.int64), 2.0, 4
    shares = np.array(
        [
            [len(part) / 2000 for part in dirichlet(labels, clients, alpha=alpha, generator=generator(seed))]
            for seed in range(400)
        ]
    )
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    np.testing.assert_allclose(shares.mean(axis=0), 1 / clients, atol=0.02)
    np.testing.assert_allclose(shares.var(axis=0), expected, rtol=0.25)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 5), st.integers(1, 10), st.integers(0, 3))
def test_shards_give_every_index_to_exactly_one_client_and_each_few_classes(
    size, clients, each, classes, seed
):
    labels = labels_of(size, classes, seed)
    if size < clients * each:
        with pytest.raises(ConfigError, match=f"each of {clients} x {each} shards, found {size}"):
            shards(labels, clients, each=each, generator=generator(seed))
        return
    parts = shards(labels, clients, each=each, generator=generator(seed))
    check_partition(parts, size, clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= each


def test_a_client_of_two_shards_has_two_classes_where_classes_are_as_long_as_shards():
    labels = np.repeat(np.arange(10), 20)
    parts = shards(labels, 10, each=2, generator=generator())
    assert [len(part) for part in parts] == [20] * 10
    assert max(len(np.unique(labels[part])) for part in parts) == 2
    one = shards(labels, 10, each=1, generator=generator())
    assert {int(labels[part][0]) for part in one} == set(range(10))
    assert all(len(np.unique(labels[part])) == 1 for part in one)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 100), ALPHAS, st.integers(0, 3))
def test_quantities_give_every_index_to_exactly_one_client_and_nobody_none(size, clients, alpha, seed):
    if size < clients:
        with pytest.raises(ConfigError, match=f"one example for each of {clients} clients, found {size}"):
            quantity(size, clients, alpha=alpha, generator=generator(seed))
        return
    check_partition(quantity(size, clients, alpha=alpha, generator=generator(seed)), size, clients)


def test_quantities_differ_as_alpha_says_and_classes_do_not():
    labels = labels_of(20_000, 5)
    few, many = (quantity(20_000, 10, alpha=alpha, generator=generator(1)) for alpha in (0.2, 100.0))
    assert max(map(len, few)) > 10 * min(map(len, few))
    assert max(map(len, many)) < 2 * min(map(len, many))
    large = [part for part in many if len(part) > 500]
    assert unlikeness(large, labels) < 0.1
    shares = np.array(
        [
            [len(part) / 20_000 for part in quantity(20_000, 4, alpha=2.0, generator=generator(seed))]
            for seed in range(300)
        ]
    )
    np.testing.assert_allclose(shares.var(axis=0), (1 / 4) * (3 / 4) / (4 * 2.0 + 1), rtol=0.3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 20), min_size=1, max_size=80), st.integers(1, 20), st.integers(0, 3))
def test_what_has_one_id_stays_together(ids, clients, seed):
    found = np.array(ids, np.int64)
    known = len(np.unique(found))
    if known < clients:
        with pytest.raises(ConfigError, match=f"natural id for each of {clients} clients, found {known}"):
            groups(found, clients, generator=generator(seed))
        return
    parts = groups(found, clients, generator=generator(seed))
    check_partition(parts, len(ids), clients)
    owners = [set(found[part].tolist()) for part in parts]
    assert sum(map(len, owners)) == known
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


@given(st.integers(1, 200), st.integers(1, 200))
def test_each_client_has_a_period_of_its_own(size, clients):
    if size < clients:
        with pytest.raises(ConfigError, match="one example for each"):
            time(size, clients)
        return
    parts = time(size, clients)
    check_partition(parts, size, clients)
    assert all((np.diff(part) == 1).all() for part in parts)
    assert [int(part[0]) for part in parts] == sorted(int(part[0]) for part in parts)
