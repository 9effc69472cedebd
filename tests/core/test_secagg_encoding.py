"""Fixed point, rotation and what rides beside the vector: sums decode to what was meant, or are refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import RunError
from fedge.pipeline import Aggregate
from fedge.privacy.secure import SecureSource
from fedge.secagg import tail
from fedge.secagg.encoding import BEYOND_BOUND, Summed, mean_of
from fedge.secagg.fixed_point import FixedPoint
from fedge.secagg.ring import Ring
from fedge.secagg.rotation import Rotation
from fedge.secagg.session import MAX_MEMBERS
from fedge.secagg.tail import Summary, Tail
from fedge.secagg.terms import SumTerms


def source(seed: int = 0) -> SecureSource:
    return SecureSource(seed.to_bytes(32, "little"))


def vector(size: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


@given(
    bits=st.sampled_from([16, 20, 32]),
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_the_sum_of_encoded_updates_is_that_of_the_updates_but_for_one_step_each(bits, weights, seed):
    grid = FixedPoint(size=100, bound=2.0, clients=6, max_weight=50, bits=bits)
    vectors = [vector(100, 10 * seed + n, 0.4) for n in range(len(weights))]
    total = grid.ring.zeros(100)
    for each, weight in zip(vectors, weights, strict=True):
        total = total + grid.encode(each, weight, source(seed))
    exact = sum(each.astype(np.float64) * weight for each, weight in zip(vectors, weights, strict=True))
    assert np.abs(grid.decode(total, len(weights)) - exact).max() <= len(weights) / grid.steps


def test_so_many_sites_fit_in_so_many_bits_as_the_how_to_says():
    page = Path(__file__).parents[2] / "docs/how-to/sum-updates-securely.md"
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 5
    for bits, weight, sites in (map(int, row) for row in rows):
        FixedPoint(size=1, bound=1.0, clients=sites, max_weight=weight, bits=bits)
        if sites < MAX_MEMBERS:
            with pytest.raises(ValueError, match="use more bits"):
                FixedPoint(size=1, bound=1.0, clients=sites + 1, max_weight=weight, bits=bits)


def test_whether_an_update_was_cut_is_known_where_it_was_encoded():
    encoding = SumTerms(least=3, clients=4, bound=1.0, metrics=(BEYOND_BOUND,)).encoding(2, b"")
    for largest, cut in ((1.0, False), (1.01, True), (-1.01, True)):
        words = encoding.encode(np.array([0.5, largest], np.float32), 1, {}, source())
        assert encoding.was_cut(words) is cut


def test_rounding_is_fair_on_average():
    grid = FixedPoint(size=200_000, bound=1.0, clients=100, bits=12)
    value = np.full(grid.size, 0.3 / grid.steps, np.float32)
    steps = grid.ring.signed(grid.encode(value, 1, source()))
    assert set(np.unique(steps)) == {0, 1}
    assert abs(steps.mean() - 0.3) < 5 * math.sqrt(0.21 / grid.size)


@given(
    bits=st.sampled_from([8, 10, 16, 31, 32, 64]),
    clients=st.integers(1, 20),
    max_weight=st.integers(1, 5),
    sign=st.sampled_from([-1, 1]),
)
@settings(deadline=None)
def test_the_largest_inputs_of_the_most_clients_do_not_wrap(bits, clients, max_weight, sign):
    def make() -> FixedPoint:
        return FixedPoint(size=3, bound=0.7, clients=clients, max_weight=max_weight, bits=bits)

    if 2 ** (bits - 2) / clients - 1 < 2 * max_weight:
        with pytest.raises(ValueError, match="bits"):
            make()
        return
    grid = make()
    total = grid.ring.zeros(3)
    for n in range(clients):
        total = total + grid.encode(np.full(3, sign * np.inf, np.float32), max_weight, source(n))
    decoded = grid.decode(total, clients)
    assert np.allclose(decoded, sign * 0.7 * max_weight * clients, rtol=1e-6, atol=clients / grid.steps)


def test_a_sum_that_its_members_cannot_have_made_is_refused():
    grid = FixedPoint(size=2, bound=1.0, clients=4, bits=16)
    total = grid.ring.of(np.array([5000, 0], np.int64))
    assert grid.levels < 5000 < 2 * grid.levels
    grid.decode(total, 2)
    with pytest.raises(RunError, match="beyond what its members"):
        grid.decode(total, 1)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_sum_may_be_as_large_as_its_members_can_make_it_and_no_larger(sign: int):
    grid = FixedPoint(size=2, bound=1.0, clients=4, bits=16)
    most = int(grid.levels) + 1  # rounded up
    assert grid.decode(grid.ring.of(np.array([0, sign * 3 * most])), 3)[1] == sign * 3 * most / grid.steps
    with pytest.raises(RunError, match="beyond what its members"):
        grid.decode(grid.ring.of(np.array([0, sign * (3 * most + 1)])), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits: expected 8 to 32"),
        ({"bits": 8, "clients": 40}, "use more bits, smaller weights or fewer clients"),
        ({"bits": 16, "max_weight": 5000}, "use more bits"),
        ({"bound": 0.0}, "bound"),
        ({"bound": math.inf}, "bound"),
        ({"size": 0}, "size"),
    ],
)
def test_encodings_that_cannot_work_are_refused_when_they_are_made(changes, message):
    with pytest.raises(ValueError, match=message):
        FixedPoint(**{"size": 4, "bound": 1.0, "clients": 10} | changes)


@pytest.mark.parametrize(
    ("value", "weight", "message"),
    [
        ([1, math.nan], 1, "NaN"),
        ([1, 2, 3], 1, "2 elements"),
        ([1, 2], 0, "weight"),
        ([1, 2], 9, "weight of 1 to 8, found 9"),
    ],
)
def test_updates_that_cannot_be_encoded_are_refused(value, weight, message):
    grid = FixedPoint(size=2, bound=1.0, clients=3, max_weight=8)
    with pytest.raises(ValueError, match=message):
        grid.encode(np.array(value, np.float32), weight, source())


# Rotation.

SIZES = st.sampled_from([1, 2, 3, 5, 8, 31, 64, 100, 1000, 5000])


@given(size=SIZES, seed=st.integers(0, 3))
@settings(deadline=None)
def test_a_rotation_is_undone_and_changes_no_norm(size: int, seed: int):
    rotation, given_vector = Rotation(size, bytes([seed]) * 32), vector(size, seed)
    before = given_vector.copy()
    rotated = rotation.apply(given_vector)
    assert (given_vector == before).all()
    assert np.allclose(rotation.undo(rotated), given_vector, atol=1e-5)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(given_vector), rel=1e-5)


def test_the_rotation_of_a_sum_is_the_sum_of_the_rotations():
    rotation = Rotation(100, b"r" * 32)
    first, second = vector(100, 1), vector(100, 2)
    together = rotation.apply(first) + rotation.apply(second)
    assert np.allclose(rotation.undo(together), first + second, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 2048])
def test_without_its_signs_it_is_the_hadamard_transform(size: int, monkeypatch):
    monkeypatch.setattr(Rotation, "_flip", lambda *_: None)
    matrix = np.ones((1, 1))
    while len(matrix) < size:  # Sylvester's construction
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    given_vector = vector(size)
    expected = matrix @ given_vector / math.sqrt(size)
    assert np.allclose(Rotation(size, b"r" * 32).apply(given_vector), expected, atol=1e-4)


@pytest.mark.parametrize("size", [4096, 5000, 8191])
@pytest.mark.parametrize("at", [0, 2500, -1])
def test_one_large_element_is_spread_over_all(size: int, at: int):
    spike = np.zeros(size, np.float32)
    spike[at] = 10
    rotation = Rotation(size, b"r" * 32)
    rotated = np.abs(rotation.apply(spike))
    assert rotated.max() <= rotation.largest(10.0)
    assert (rotated > 0).mean() > 0.9 or size != 4096


def test_seeds_give_different_rotations():
    first, second = (Rotation(64, bytes([n]) * 32).apply(vector(64)) for n in (1, 2))
    assert not np.allclose(first, second, atol=0.1)


def test_with_rotation_eight_bits_carry_what_otherwise_needs_more():
    size, clients = 4096, 8
    updates = [vector(size, n, 0.01) for n in range(clients)]
    for n, update in enumerate(updates):
        update[n] = 3.0  # one large element decides the range
    exact = sum(update.astype(np.float64) for update in updates)
    norm = max(float(np.linalg.norm(update)) for update in updates)

    def error(rotation: Rotation | None) -> float:
        bound = rotation.largest(norm) if rotation else norm
        grid = FixedPoint(size, bound, clients, bits=8)
        total = grid.ring.zeros(size)
        for n, update in enumerate(updates):
            total = total + grid.encode(rotation.apply(update) if rotation else update, 1, source(n))
        decoded = grid.decode(total, clients).astype(np.float32)
        return float(np.linalg.norm((rotation.undo(decoded) if rotation else decoded) - exact))

    assert error(Rotation(size, b"r" * 32)) < error(None) / 3


# What rides beside the vector.


def test_an_update_and_what_rides_beside_it_come_back_packed_and_unpacked():
    encoding = SumTerms(least=3, clients=4, bound=1.0, bits=12, metrics=("loss",)).encoding(5, b"")
    words = encoding.encode(vector(5), 1, {"loss": 0.5}, source())
    data = encoding.pack(words)
    unpacked = encoding.unpack(data)
    assert [each.size for each in unpacked] == [5, 4]
    assert [each.tolist() for each in encoding.unpack(encoding.pack(unpacked))] == [
        each.tolist() for each in unpacked
    ]
    assert (encoding.decode(unpacked, 1).vector == encoding.decode(words, 1).vector).all()
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(ValueError, match=f"expected {len(data)} bytes, found {len(wrong)}"):
            encoding.unpack(wrong)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_sum_of_what_sites_send_is_that_of_their_updates_rotated_or_not(rotate: bool):
    encoding = SumTerms(least=3, clients=3, bound=20.0, rotate=rotate).encoding(100, b"seed")
    updates = [vector(100, n) for n in range(3)]
    parts = [encoding.encode(update, 1, {}, source(n)) for n, update in enumerate(updates)]
    total = [sum(words[1:], start=words[0]) for words in zip(*parts, strict=True)]
    assert np.allclose(encoding.decode(total, 3).vector, sum(updates), atol=1e-5)


def test_of_an_evaluation_there_is_only_what_rides_beside():
    encoding = SumTerms(least=3, clients=3, bound=1.0, metrics=("loss",)).encoding(0, b"")
    words = encoding.encode(np.zeros(0, np.float32), 1, {"loss": 0.5}, source())
    assert [(ring.bits, size) for ring, size in encoding.rings] == [(64, 4)]
    assert [each.size for each in words] == [4] == [each.size for each in encoding.zeros()]
    found = encoding.decode(encoding.unpack(encoding.pack(words)), 1)
    assert (found.vector.size, found.summary.means) == (0, {"loss": 0.5})


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_encoded_as_the_largest_there_is(wrong: float, rotate: bool):
    encoding = SumTerms(least=3, clients=4, bound=1.0, rotate=rotate).encoding(2, b"")
    with pytest.raises(ValueError, match="NaN or infinity"):
        encoding.encode(np.array([0.5, wrong], np.float32), 1, {}, source())


@pytest.mark.parametrize(("weight", "counted"), [(1, 1), (7, 7), (50, 50), (51, 50), (10**9, 50)])
def test_a_weight_is_cut_to_the_largest_there_is(weight: int, counted: int):
    encoding = SumTerms(least=3, clients=4, bound=1.0, max_weight=50).encoding(2, b"")
    found = encoding.decode(encoding.encode(np.array([0.5, -1.0], np.float32), weight, {}, source()), 1)
    assert found.summary.weight == counted
    assert found.vector == pytest.approx([0.5 * counted, -counted], abs=1e-4)


def test_a_sum_that_is_too_large_to_be_turned_back_is_refused():
    encoding = SumTerms(least=3, clients=4, bound=1e38, rotate=True).encoding(4, b"")
    one = encoding.encode(np.array([1e38, 0, 0, 0], np.float32), 1, {}, source())
    four = [words * words.dtype.type(4) for words in one]
    assert np.isfinite(encoding.decode(one, 1).vector).all()
    with np.errstate(all="ignore"), pytest.raises(RunError, match="choose a smaller bound"):
        encoding.decode(four, 4)


def test_that_updates_were_cut_is_said_where_it_has_happened():
    def mean(*shares: float) -> Aggregate:
        sums = [
            Summed(np.array([6.0]), Summary(2, 3, {BEYOND_BOUND: (3 * share, 3), "loss": (0.0, 3)}))
            for share in shares
        ]
        return mean_of(sums, ["b", "a"])

    assert mean(0.0).metrics == {"loss": 0.0}
    assert mean(0.0, 0.5).metrics == {"loss": 0.0, BEYOND_BOUND: 0.25}
    assert (mean(0.0).vector.tolist(), mean(0.0).clients) == ([2.0], ("a", "b"))


@pytest.mark.parametrize("weight", [0, -1, 101])
def test_a_weight_out_of_range_is_not_counted(weight: int):
    with pytest.raises(ValueError, match=f"a weight of 1 to 100, found {weight}"):
        Tail((), clients=3, max_weight=100).encode(weight, {})


@pytest.mark.parametrize(("clients", "max_weight"), [(0, 1), (1, 0), (-1, 1)])
def test_sums_of_nobody_or_of_no_weight_are_none(clients: int, max_weight: int):
    with pytest.raises(ValueError, match="clients and weights of 1 or more"):
        Tail((), clients=clients, max_weight=max_weight)
    Tail((), clients=1, max_weight=1)


def test_weights_and_metrics_are_the_weighted_means():
    beside = Tail(("accuracy", "loss"), clients=3, max_weight=100)
    total = beside.encode(10, {"accuracy": 0.5, "loss": 2.0})
    total = total + beside.encode(30, {"accuracy": 0.9, "loss": -4.0})
    total = total + beside.encode(60, {"accuracy": 0.1})
    found = beside.decode(total, 3)
    assert (found.members, found.weight) == (3, 100)
    assert found.means["accuracy"] == pytest.approx((5 + 27 + 6) / 100, abs=1e-7)
    assert found.means["loss"] == pytest.approx((20 - 120) / 40, abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_left_out_and_one_that_nobody_reports_has_no_mean(value: float):
    beside = Tail(("loss",), clients=3)
    total = beside.encode(1, {"loss": value}) + beside.encode(1, {"loss": 3.0})
    assert beside.decode(total, 2).means["loss"] == pytest.approx(3.0)
    assert beside.decode(beside.encode(1, {"other": 1.0}), 1).means == {}


def test_absurd_metrics_are_cut_and_nothing_wraps():
    beside = Tail(("loss",), clients=100, max_weight=1000)
    total = sum(
        (beside.encode(1000, {"loss": -1e300}) for _ in range(99)), start=beside.encode(1000, {"loss": -1e9})
    )
    assert beside.decode(total, 100).means["loss"] == -tail.BOUND
    assert beside.decode(beside.encode(1000, {"loss": 1e300}), 1).means["loss"] == tail.BOUND


@pytest.mark.parametrize(
    "numbers",
    [
        [2, 3, 0, 0],
        [3, 2, 0, 0],
        [3, 301, 0, 0],
        [3, 5, 0, 6],
        [3, 5, 2**62, 1],
        [3, -5, 0, 0],
        [3, 5, 0, -1],
    ],
)
def test_sums_beside_the_vector_that_its_members_cannot_have_made_are_refused(numbers: list[int]):
    beside = Tail(("loss",), clients=3, max_weight=100)
    with pytest.raises(RunError, match="sent something else"):
        beside.decode(Ring(64).of(np.array(numbers, np.int64)), 3)


def test_weights_too_large_for_sums_of_metrics_are_refused():
    with pytest.raises(ValueError, match="max_weight"):
        Tail(("loss",), clients=2**20, max_weight=2**29)
    largest = Tail(("loss",), clients=2**20, max_weight=2**22)  # of whose metrics a step is 1.0
    assert largest.decode(largest.encode(2**22, {"loss": 3.0}), 1).means == {"loss": 3.0}
    with pytest.raises(ValueError, match="max_weight"):
        Tail(("loss",), clients=2**20, max_weight=2**22 + 1)
