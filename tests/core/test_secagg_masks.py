"""Rings, masks and packing: exact modular arithmetic, whatever the width and however it is shared among threads."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.secagg import masks
from fedge.secagg.masks import apply_masks, blocks_of
from fedge.secagg.ring import Ring

BITS = st.sampled_from([8, 9, 12, 16, 17, 20, 31, 32, 64])
ONE, TWO = b"1" * 32, b"2" * 32


def words(ring: Ring, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, size, np.uint64).astype(ring.dtype)


def keystream(key: bytes, count: int) -> bytes:
    """The whole of it, from the counter 0 on."""
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(count))


@given(bits=BITS, size=st.integers(0, 300), seed=st.integers(0, 9))
def test_packing_keeps_the_bits_of_the_ring_and_no_others(bits: int, size: int, seed: int):
    ring = Ring(bits)
    vector = words(ring, size, seed)
    data = ring.pack(vector)
    assert len(data) == ring.packed_bytes(size)
    assert (ring.unpack(data, size) == vector & ring.dtype.type(ring.modulus - 1)).all()


@pytest.mark.parametrize("bits", [12, 24])
def test_packing_goes_on_across_groups(bits: int):
    ring = Ring(bits)
    vector = words(ring, 200_003)
    assert (ring.unpack(ring.pack(vector), len(vector)) == vector & ring.dtype.type(ring.modulus - 1)).all()


@given(bits=BITS, values=st.lists(st.integers(-(2**62), 2**62), max_size=20))
def test_what_is_small_enough_is_read_back_signed(bits: int, values: list[int]):
    ring = Ring(bits)
    half = ring.modulus // 2
    inside = [value for value in values if -half <= value < half]
    assert ring.signed(ring.of(np.array(inside, np.int64))).tolist() == inside


@pytest.mark.parametrize("bits", [0, 7, 33, 63, 65])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(ValueError, match="bits"):
        Ring(bits)


def test_packed_bytes_of_another_length_are_refused():
    with pytest.raises(ValueError, match="expected 15 bytes for 10 elements, found 14"):
        Ring(12).unpack(bytes(14), 10)


@given(bits=BITS, size=st.integers(1, 200), cut=st.integers(0, 3))
@settings(deadline=None)
def test_masks_are_the_keystream_from_its_beginning_in_little_endian_words(bits: int, size: int, cut: int):
    ring = Ring(bits)
    vector = words(ring, size)
    expected = vector + np.frombuffer(keystream(ONE, vector.nbytes), ring.dtype)
    expected -= np.frombuffer(keystream(TWO, vector.nbytes), ring.dtype)
    apply_masks(vector, add=[ONE], subtract=[TWO])
    assert (vector == expected).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_long_vectors_are_masked_the_same_on_any_number_of_threads(bits: int, threads: int, monkeypatch):
    monkeypatch.setattr("fedge.parallel.processors", lambda: threads)
    monkeypatch.setattr("fedge.parallel.ELEMENTS", 1)
    ring = Ring(bits)
    vector = words(ring, 3 * masks._PART_BYTES // ring.dtype.itemsize + 5)
    expected = vector + np.frombuffer(keystream(ONE, vector.nbytes), ring.dtype)
    apply_masks(vector, add=[ONE])
    assert (vector == expected).all()


def test_a_second_vector_has_its_masks_where_those_of_the_first_end():
    first, second = words(Ring(32), 6), words(Ring(64), 3)
    stream = keystream(ONE, 32 + second.nbytes)  # 24 bytes, in blocks of 16
    expected = second + np.frombuffer(stream[32:], "<u8")
    assert blocks_of(first) == 2
    apply_masks(second, add=[ONE], first_block=blocks_of(first))
    assert (second == expected).all()


def test_keys_of_another_size_are_refused_before_anything_is_masked():
    vector = words(Ring(32), 4)
    before = vector.copy()
    with pytest.raises(ValueError, match="mask keys of 32 bytes"):
        apply_masks(vector, add=[ONE, b"short"])
    assert (vector == before).all()
