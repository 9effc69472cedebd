"""Keys, signatures and byte layouts: what is none is refused by its type, and no two things are said alike."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from secagg_sessions import public, signer

from fedge.secagg.canonical import bitmap, layout, members_of
from fedge.secagg.keys import BadKeyError, BadSealError, KeyPair, Suite, open_seal, seal
from fedge.secagg.site import verified

KEY = b"k" * 32


def test_a_signature_is_verified_under_the_key_that_has_made_it_and_no_other():
    signature = signer(1).sign(b"said")
    assert verified(public(signer(1)), signature, b"said")
    assert not verified(public(signer(2)), signature, b"said")
    assert not verified(public(signer(1)), signature, b"something else")
    assert not verified(public(signer(1)), signature[:-1], b"said")


@pytest.mark.parametrize("key", [None, b"", b"short", b"k" * 33, b"\xff" * 32])
def test_nothing_is_verified_under_what_is_no_key(key: bytes | None):
    assert not verified(key, signer(1).sign(b"said"), b"said")


@pytest.mark.parametrize("suite", list(Suite))
def test_two_agree_on_one_secret_with_whoever_has_the_other_key(suite: Suite):
    one, other = (KeyPair.of(bytes([n]) * 32, suite, "mask") for n in (1, 2))
    assert one.agree(other.public) == other.agree(one.public)
    secret, ciphertext = one.encapsulate(other.public)
    assert (len(ciphertext), other.decapsulate(ciphertext)) == (suite.ciphertext_bytes, secret)
    assert bool(secret) is suite.has_kem


@pytest.mark.parametrize("suite", list(Suite))
@pytest.mark.parametrize("change", [-1, 1])
def test_keys_and_ciphertexts_of_another_size_are_refused(suite: Suite, change: int):
    pair = KeyPair.of(KEY, suite, "mask")
    with pytest.raises(BadKeyError, match=f"public key of {suite.public_bytes} bytes"):
        pair.agree(bytes(suite.public_bytes + change))
    if suite.has_kem:
        with pytest.raises(BadKeyError, match="ML-KEM-768"):
            pair.encapsulate(pair.public[: suite.public_bytes - 1])
        with pytest.raises(BadSealError, match="ciphertext of 1088 bytes"):
            pair.decapsulate(bytes(suite.ciphertext_bytes + change))
    with pytest.raises(BadSealError, match="ciphertext of"):
        pair.decapsulate(bytes(suite.ciphertext_bytes + 1))


def test_a_ciphertext_is_refused_where_there_is_no_kem():
    kem = MLKEM768PrivateKey.from_seed_bytes(bytes(64)).public_key()
    with pytest.raises(BadSealError, match="ciphertext of 0 bytes"):
        KeyPair.of(KEY, Suite.X25519, "mask").decapsulate(kem.encapsulate()[1])


def test_what_is_sealed_opens_under_its_key_with_what_is_bound_to_it():
    sealed = seal(KEY, b"message", b"sid", 1)
    assert open_seal(KEY, sealed, b"sid", 1) == b"message"
    for key, wrong, bound in (
        (b"x" * 32, sealed, (b"sid", 1)),
        (KEY, sealed, (b"sid", 2)),
        (KEY, sealed[:-1], (b"sid", 1)),
        (KEY, b"", (b"sid", 1)),
        (KEY, bytes(len(sealed)), (b"sid", 1)),
    ):
        with pytest.raises(BadSealError):
            open_seal(key, wrong, *bound)


def test_layouts_are_different_where_fields_are():
    said = [
        layout("a"),
        layout("b"),
        layout("a", b""),
        layout("a", b"", b""),
        layout("a", b"xy"),
        layout("a", b"x", b"y"),
        layout("a", b"", b"xy"),
        layout("a", 0),
        layout("a", 1),
        layout("a", 2**64 - 1),
    ]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("number", [-1, -(2**63), 2**64, 2**70])
def test_a_number_that_has_no_eight_bytes_has_no_layout(number: int):
    with pytest.raises(ValueError, match="from 0 to 2\\^64 - 1"):
        layout("a", number)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 256])
def test_members_come_back_from_a_bitmap(count: int):
    for members in (set(), {count} - {0}, set(range(1, count + 1, 3)), set(range(1, count + 1))):
        data = bitmap([number in members for number in range(1, count + 1)])
        assert members_of(data, count) == members


@pytest.mark.parametrize(
    ("data", "count"),
    [(b"", 1), (b"\x00", 0), (b"\x01", 9), (b"\x01\x00", 8), (b"\x01\x02", 9), (b"\x80", 7)],
)
def test_a_bitmap_of_another_size_or_of_more_members_is_refused(data: bytes, count: int):
    with pytest.raises(ValueError, match=f"a bit for each of {count} members"):
        members_of(data, count)
