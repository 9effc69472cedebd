"""Secret sharing: any threshold of shares rebuilds, fewer say nothing, and wrong ones are found out."""

from __future__ import annotations

import math
from collections import Counter
from hashlib import sha256
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.privacy.secure import SecureSource
from fedge.secagg import decoding, shamir

SECRETS = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=3)


def source(seed: int = 0) -> SecureSource:
    return SecureSource(seed.to_bytes(32, "little"))


@given(secrets=SECRETS, data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_threshold_of_shares_rebuilds_every_secret(secrets: list[bytes], data: st.DataObject):
    count = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, count))
    shares = shamir.split(secrets, shares=count, threshold=threshold, source=source())
    chosen = data.draw(st.permutations(range(count)))[:threshold]
    assert shamir.rebuild([at + 1 for at in chosen], shares[chosen]) == secrets


def test_the_extremes_of_secrets_rebuild():
    secrets = [bytes(32), b"\xff" * 32, b"\x00" * 31 + b"\x80", b"\x01" + bytes(31)]
    shares = shamir.split(secrets, shares=256, threshold=171, source=source())
    points = list(range(256, 85, -1))
    assert shamir.rebuild(points, shares[[point - 1 for point in points]]) == secrets


@pytest.mark.parametrize("threshold", [2, 3])
def test_fewer_shares_say_nothing_in_a_field_that_can_be_searched(threshold: int, monkeypatch):
    monkeypatch.setattr(shamir, "PRIME", 5)
    monkeypatch.setattr(shamir, "_P", np.uint64(5))
    points = np.arange(1, 5, dtype=np.uint64)[:, None]
    seen = {}
    for secret in range(5):
        views: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
        for rest in product(range(5), repeat=threshold - 1):
            values = shamir._at(np.array([[secret], *([each] for each in rest)], np.uint64), points)[:, 0]
            for some in combinations(range(4), threshold - 1):
                views.setdefault(some, Counter())[tuple(int(values[at]) for at in some)] += 1
        # Every combination of values is seen as often as any other, whatever the secret.
        assert all(len(view) == 5 ** (threshold - 1) and set(view.values()) == {1} for view in views.values())
        seen[secret] = views
    assert all(views == seen[0] for views in seen.values())


def test_the_other_coefficients_are_uniform_elements_of_the_field():
    words = shamir.uniform(source(3), 200_000)
    assert int(words.max()) < shamir.PRIME
    shares, _ = np.histogram(words.astype(np.float64), 20, (0, shamir.PRIME))
    assert ((shares - 10_000) ** 2 / 10_000).sum() < 60  # chi-square with 19 degrees of freedom


def test_words_beyond_the_last_multiple_of_the_prime_are_drawn_again():
    draws = [[2**64 - 1, 5], [7]]

    class Source:
        def uint64(self, count: int) -> np.ndarray:
            return np.array(draws.pop(0), np.uint64)

    assert shamir.uniform(Source(), 2).tolist() == [7, 5]  # type: ignore[arg-type]


def test_two_sharings_of_one_secret_differ():
    first, second = (shamir.split([b"s" * 32], shares=3, threshold=2, source=source(seed)) for seed in (1, 2))
    assert (first != second).all()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8, unique=True), st.integers(0, 300))
def test_weights_are_lagranges(points: list[int], at: int):
    prime = shamir.PRIME
    expected = []
    for x in points:
        above = below = 1
        for other in points:
            if other != x:
                above, below = above * (at - other) % prime, below * (x - other) % prime
        expected.append(above * pow(below, -1, prime) % prime)
    assert shamir.weights_at(points, at).tolist() == expected


@pytest.mark.parametrize(
    ("secrets", "shares", "threshold"), [([b"s" * 31], 3, 2), ([b"s" * 32], 3, 4), ([b"s" * 32], 3, 0)]
)
def test_what_cannot_be_shared_is_refused(secrets, shares, threshold):
    with pytest.raises(ValueError, match="expected"):
        shamir.split(secrets, shares=shares, threshold=threshold, source=source())


def test_there_are_no_more_shares_than_the_field_has_points_beside_the_secrets(monkeypatch):
    monkeypatch.setattr(shamir, "PRIME", 5)
    assert shamir.split([b"s" * 32], shares=4, threshold=2, source=source()).shape == (4, 1, 9)
    with pytest.raises(ValueError, match="found 2 of 5"):
        shamir.split([b"s" * 32], shares=5, threshold=2, source=source())


def test_of_a_threshold_of_one_each_share_is_the_secret():
    shares = shamir.split([b"s" * 32], shares=3, threshold=1, source=source())
    assert [shamir.rebuild([at + 1], shares[at : at + 1]) for at in range(3)] == [[b"s" * 32]] * 3


def test_a_polynomials_values_at_some_points_give_those_at_others_the_secret_among_them():
    polynomial = [7 + 3 * x + 5 * x * x for x in range(6)]
    for points in ([0, 1, 2], [1, 4, 5], [5, 0, 3]):
        values = np.array([polynomial[point] for point in points], np.uint32)
        assert [int(shamir.combine(points, values, at=at)) for at in range(6)] == polynomial


@pytest.mark.parametrize("points", [[1, 1], [shamir.PRIME], [-1]])
def test_points_that_are_not_different_elements_are_refused(points: list[int]):
    with pytest.raises(ValueError, match="different points"):
        shamir.weights_at(points, 0)


def test_shares_of_no_secret_rebuild_to_nothing():
    limbs = np.full((1, 1, shamir.LIMBS), 2**31, np.uint32)  # 32 bits, where limbs have 31
    assert shamir.rebuild([1], limbs) == [None]
    for limb, too_much in ((0, 2**31), (3, 2**31 + 10), (8, 2**8)):  # the ninth has what is left of 256 bits
        limbs = np.zeros((1, 1, shamir.LIMBS), np.uint32)
        limbs[0, 0, limb] = too_much
        assert shamir.rebuild([1], limbs) == [None]


# Wrong shares.


def rebuilt(secrets: list[bytes], shares: np.ndarray, threshold: int, points: list[int] | None = None):
    points = points or list(range(1, len(shares) + 1))
    return decoding.rebuild(
        points,
        shares,
        threshold=threshold,
        right=[lambda found, each=each: sha256(found).digest() == sha256(each).digest() for each in secrets],
    )


def test_fewer_shares_than_the_threshold_rebuild_nothing():
    secrets = [b"a" * 32, b"b" * 32]
    shares = shamir.split(secrets, shares=5, threshold=4, source=source(1))
    assert rebuilt(secrets, shares[:3], 4)[1] == [0, 1]
    assert rebuilt(secrets, shares[:1], 4)[1] == [0, 1]


def test_in_a_large_session_liars_are_found_whose_every_subset_cannot_be_tried():
    secrets = [b"a" * 32, b"b" * 32]
    shares = shamir.split(secrets, shares=40, threshold=22, source=source(1))
    shares[:9] ^= 5
    assert math.comb(40, 9) > 1e8
    assert rebuilt(secrets, shares, 22) == (secrets, [])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_as_many_liars_as_half_of_the_spare_shares_change_nothing(data: st.DataObject):
    count = data.draw(st.integers(3, 14))
    threshold = data.draw(st.integers(1, count))
    secrets = [bytes([n]) * 32 for n in range(data.draw(st.integers(1, 3)))]
    shares = shamir.split(secrets, shares=count, threshold=threshold, source=source(1))
    liars = data.draw(st.sets(st.integers(0, count - 1), max_size=(count - threshold) // 2))
    for liar in liars:
        at, limb = data.draw(st.integers(0, len(secrets) - 1)), data.draw(st.integers(0, shamir.LIMBS - 1))
        shares[liar, at, limb] ^= data.draw(st.integers(1, 2**31 - 1))
    assert rebuilt(secrets, shares, threshold) == (secrets, [])


def test_liars_who_agree_with_each_other_are_found_too():
    secrets = [b"a" * 32, b"b" * 32]
    shares = shamir.split(secrets, shares=10, threshold=4, source=source(1))
    lie = shamir.split([b"x" * 32, b"y" * 32], shares=10, threshold=4, source=source(2))
    shares[[0, 1, 2]] = lie[[0, 1, 2]]
    assert rebuilt(secrets, shares, 4) == (secrets, [])


def test_more_liars_than_can_be_told_apart_are_a_secret_that_cannot_be_rebuilt():
    secrets = [b"a" * 32, b"b" * 32]
    shares = shamir.split(secrets, shares=5, threshold=4, source=source(1))
    shares[0, 0, 0] ^= 1
    shares[1, 0, 0] ^= 64
    assert rebuilt(secrets, shares, 4)[1] == [0]


def test_one_liar_among_one_more_than_the_threshold_is_found_by_leaving_each_out():
    secrets = [b"a" * 32, b"b" * 32]
    shares = shamir.split(secrets, shares=5, threshold=4, source=source(1))
    shares[2, :, 3] ^= 1
    assert rebuilt(secrets, shares, 4) == (secrets, [])


def test_a_dealer_whose_shares_are_of_another_secret_is_told_from_those_who_hold_them():
    secrets = [b"a" * 32, b"b" * 32]
    shares = shamir.split([b"a" * 32, b"z" * 32], shares=7, threshold=5, source=source(1))
    found, missing = rebuilt(secrets, shares, 5)
    assert (found[0], missing) == (secrets[0], [1])


def test_a_dealer_of_shares_of_no_secret_hides_no_liar():
    """What the one has dealt cannot be rebuilt, and says nothing of the others: the liar shows by the other secret."""
    secrets = [b"a" * 32, b"b" * 32]
    shares = shamir.split(secrets, shares=7, threshold=5, source=source(1))
    shares[:, 1] = 2**31
    shares[0, 0] ^= 1
    found, missing = rebuilt(secrets, shares, 5)
    assert (found[0], missing) == (secrets[0], [1])
