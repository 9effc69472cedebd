"""Random numbers that follow from a seed: the same everywhere, unrelated for different purposes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedge.seeds import derive_seed, mixed, stream

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50, unique=True)


def test_streams_are_splitmix64():
    # The first numbers from the seeds 0 and 1234567, as the reference implementation (Vigna 2015) prints them.
    found = stream(np.array([0, 1234567], np.uint64), 3)
    assert found[0].tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert found[1].tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(keys=KEYS, salt=st.integers(0, 2**63 - 1))
def test_different_keys_never_meet_and_each_is_mixed_by_itself(keys: list[int], salt: int):
    found = mixed(np.array(keys, np.uint64), salt)
    assert len(set(found.tolist())) == len(keys)
    assert found.tolist() == [int(mixed(np.array([key], np.uint64), salt)[0]) for key in keys]


@given(keys=KEYS, size=st.integers(0, 20))
def test_a_stream_is_the_beginning_of_a_longer_one(keys: list[int], size: int):
    longer = stream(np.array(keys, np.uint64), 20)
    assert np.array_equal(stream(np.array(keys, np.uint64), size), longer[:, :size])


def test_bits_of_neighbouring_keys_and_salts_are_unrelated():
    keys = np.arange(4096, dtype=np.uint64)
    for one, other in ((mixed(keys, 3), mixed(keys, 4)), (mixed(keys, 3), mixed(keys + np.uint64(1), 3))):
        flipped = np.unpackbits((one ^ other).view(np.uint8)).reshape(-1, 64).mean(axis=0)
        assert 0.45 < flipped.min() <= flipped.max() < 0.55


def test_each_purpose_has_a_seed_of_its_own():
    seeds = [
        derive_seed(7, *parts) for parts in (("a",), ("b",), ("a", 1), ("a", "1"), ("a", 2), (), ("a", 1, 1))
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(8, "a") != derive_seed(7, "a")
