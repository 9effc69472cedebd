"""Keys with which sites sign, the proof that a request comes with one, and the authority's key in a file."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.errors import IdentityError, RemoteProtocolError
from fedge.principal import key_to_pem
from fedge.secagg.canonical import layout
from fedge.secagg.directory import Directory
from fedge.signing import (
    SignedDirectory,
    authority_of_pem,
    authority_to_pem,
    check_proof,
    key_fingerprint,
    make_signing_key,
    prove,
    public_bytes,
    signing_key_of_pem,
)

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = public_bytes(KEY)
REQUEST = {"federation": "f" * 16, "site": "icu-1", "csr_der": b"request"}
IDENTITY_POINT = bytes([1]) + bytes(31)


def test_a_signing_key_is_new_each_time_and_survives_its_pem() -> None:
    one, two = make_signing_key(), make_signing_key()
    assert one != two
    assert b"BEGIN PRIVATE KEY" in one
    signature = signing_key_of_pem(one).sign(b"message")
    signing_key_of_pem(one).public_key().verify(signature, b"message")


@pytest.mark.parametrize(
    ("pem", "message"),
    [
        (b"", "PEM"),
        (b"garbage", "PEM"),
        (make_signing_key()[:60], "PEM"),
        (key_to_pem(ec.generate_private_key(ec.SECP256R1())), "Ed25519"),
    ],
    ids=["empty", "garbage", "cut short", "another curve"],
)
def test_what_is_no_signing_key_is_refused(pem: bytes, message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        signing_key_of_pem(pem)


def test_an_encrypted_signing_key_is_refused() -> None:
    pem = KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(IdentityError, match="unencrypted") as caught:
        signing_key_of_pem(pem)
    assert "secret" not in str(caught.value)


def test_a_proof_is_of_one_key_site_federation_and_request() -> None:
    proof = prove(KEY, **REQUEST)  # type: ignore[arg-type]
    assert check_proof(PUBLIC, proof, **REQUEST) == PUBLIC  # type: ignore[arg-type]
    for change in ({"site": "icu-2"}, {"federation": "0" * 16}, {"csr_der": b"another"}):
        with pytest.raises(RemoteProtocolError, match="proof by its own key for this request"):
            check_proof(PUBLIC, proof, **REQUEST | change)  # type: ignore[arg-type]
    other = public_bytes(Ed25519PrivateKey.generate())
    with pytest.raises(RemoteProtocolError, match="proof by its own key"):
        check_proof(other, proof, **REQUEST)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "proof"),
    [(b"", b""), (b"", b"p" * 64), (PUBLIC, b""), (PUBLIC + b"k", b"p" * 64), (PUBLIC, b"p" * 63)],
)
def test_a_key_or_proof_of_another_size_is_refused(key: bytes, proof: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="expected a key of 32 bytes and a proof of 64"):
        check_proof(key, proof, **REQUEST)  # type: ignore[arg-type]


@pytest.mark.parametrize("sign_of_x", [0, 0x80])
def test_a_key_under_which_anybody_can_sign_is_refused(sign_of_x: int) -> None:
    key = IDENTITY_POINT[:-1] + bytes([IDENTITY_POINT[-1] | sign_of_x])
    forged = IDENTITY_POINT + bytes(32)
    if not sign_of_x:  # the attack is real: the library itself accepts this for every message
        Ed25519PublicKey.from_public_bytes(key).verify(forged, b"anything")
    with pytest.raises(RemoteProtocolError, match="small order"):
        check_proof(key, forged, **REQUEST)  # type: ignore[arg-type]


def test_a_fingerprint_names_one_key() -> None:
    assert key_fingerprint(PUBLIC) == key_fingerprint(bytes(PUBLIC))
    assert len(key_fingerprint(PUBLIC)) == 32
    assert key_fingerprint(PUBLIC) != key_fingerprint(b"x" * 32)


def test_an_authority_is_read_from_its_certificate_or_its_public_key() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    assert authority_of_pem(pem) == authority_of_pem(authority_to_pem(key.public_key())) == key.public_key()


@pytest.mark.parametrize(
    ("pem", "message"),
    [
        (b"", "PEM"),
        (b"garbage", "PEM"),
        (b"-----BEGIN CERTIFICATE-----", "PEM"),
        (b"#" * 20_000, "at most"),
        (key_to_pem(ec.generate_private_key(ec.SECP256R1())), "PEM"),
        (authority_to_pem(ec.generate_private_key(ec.SECP384R1()).public_key()), "P-256"),
        (
            rsa.generate_private_key(65537, 2048)
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
            "P-256",
        ),
    ],
    ids=["empty", "garbage", "no key", "too long", "private", "another curve", "RSA"],
)
def test_what_is_no_authority_is_refused(pem: bytes, message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        authority_of_pem(pem)


def test_a_proof_says_nothing_in_another_place() -> None:
    """Its layout has a domain of its own, so that no other signature of a site can serve as one."""
    lookalike = KEY.sign(layout("advertise", *REQUEST.values()))
    with pytest.raises(RemoteProtocolError):
        check_proof(PUBLIC, lookalike, **REQUEST)  # type: ignore[arg-type]


def test_a_signed_directory_does_not_print_its_signature() -> None:
    assert "signature" not in repr(SignedDirectory(Directory.of("f", 1, []), b"secret"))
