"""What a site has its coordinator keep of its ledger: only the site can read it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge_client.identity import make_csr
from fedge_client.witness import Seal

KEY, OTHER = make_csr()[0], make_csr()[0]
HEAD = (4711, bytes(range(32)))


@given(st.integers(0, 2**63), st.binary(min_size=32, max_size=32))
def test_a_site_reads_what_it_has_sealed_also_after_a_restart(seq, digest):
    assert Seal(KEY, "data").open(Seal(KEY, "data").close((seq, digest))) == (seq, digest)


def test_two_of_the_same_are_not_alike_and_say_nothing():
    seal = Seal(KEY, "data")
    first, second = seal.close(HEAD), seal.close(HEAD)
    assert first != second
    assert len(first) == len(second) == len(seal.close((1, bytes(32)))) <= 256
    assert HEAD[1] not in first
    assert "key" not in repr(seal).lower()


@pytest.mark.parametrize(
    "sealed",
    [b"", b"x", b"x" * 68, Seal(OTHER, "data").close(HEAD), Seal(KEY, "more").close(HEAD)],
    ids=["nothing", "a byte", "damaged", "another key", "another data set"],
)
def test_what_is_of_another_key_or_data_set_or_damaged_is_nothing(sealed):
    assert Seal(KEY, "data").open(sealed) is None


@given(st.integers(0, 67), st.integers(1, 255))
def test_any_byte_that_is_changed_is_noticed(at, flip):
    sealed = bytearray(Seal(KEY, "data").close(HEAD))
    sealed[at] ^= flip
    assert Seal(KEY, "data").open(bytes(sealed)) is None
