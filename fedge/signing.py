"""The keys with which sites sign (Ed25519), and those with which the directory of them is signed (P-256).

A site's signing key lives as long as its enrolment and never leaves it. What goes out, with the request for a
certificate, is the public key and a proof: a signature over that very request, so that nobody can enrol with a key
that is somebody else's, or move a proof from one request to another.

Values and pure steps: files and entropy are the shells' business, but for the library's own when a key is made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.errors import IdentityError, RemoteProtocolError
from fedge.principal import MAX_CERTIFICATE_BYTES, load_certificate
from fedge.secagg.canonical import layout
from fedge.secagg.directory import KEY_BYTES, Directory

PROOF_BYTES: Final = 64
MAX_SIGNATURE_BYTES: Final = 80
"""Of the directory: ECDSA over P-256 in DER form takes at most 72."""

_SMALL_ORDER: Final = frozenset(
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)
"""Points of order 1, 2, 4 and 8 on edwards25519, without the sign of x: "keys" under which anybody can sign."""


@dataclass(frozen=True, slots=True)
class SignedDirectory:
    """A directory and the signature that came with it. Trust neither before `Directory.check` has returned."""

    directory: Directory
    signature: bytes = field(repr=False)


def make_signing_key() -> bytes:
    """A new Ed25519 private key as unencrypted PKCS#8 PEM."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signing_key_of_pem(pem: bytes) -> Ed25519PrivateKey:
    """The Ed25519 private key in a PEM text.

    Raises:
        IdentityError: it is not an unencrypted private key, or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(
            "signing key: expected an unencrypted private key in PEM form, found something else"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError("signing key: expected an Ed25519 private key, found one of another kind")
    return key


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The public key that belongs to a private one: 32 bytes."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def key_fingerprint(key: bytes) -> str:
    """What people compare of a public key: the first 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(key).hexdigest()[:32]


def prove(key: Ed25519PrivateKey, *, federation: str, site: str, csr_der: bytes) -> bytes:
    """The proof that whoever asks for this certificate holds the key: 64 bytes."""
    return key.sign(_proven(federation, site, csr_der))


def check_proof(key: bytes, proof: bytes, *, federation: str, site: str, csr_der: bytes) -> bytes:
    """`key`, if it is a site's public key and `proof` was made with it, by this site, for this very request.

    Raises:
        RemoteProtocolError: it is not, or the proof was not.
    """
    if len(key) != KEY_BYTES or len(proof) != PROOF_BYTES:
        raise RemoteProtocolError(
            f"identity key: expected a key of {KEY_BYTES} bytes and a proof of {PROOF_BYTES}, found "
            f"{len(key)} and {len(proof)}: site and coordinator need matching versions of fedge"
        )
    if key[:-1] + bytes([key[-1] & 0x7F]) in _SMALL_ORDER:
        raise RemoteProtocolError("identity key: expected an Ed25519 key, found a point of small order")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(proof, _proven(federation, site, csr_der))
    except (InvalidSignature, ValueError):
        raise RemoteProtocolError(
            "identity key: expected a proof by its own key for this request, found another"
        ) from None
    return key


def authority_of_pem(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 public key in a PEM text, be it a certificate's or the key itself.

    Raises:
        IdentityError: it is neither, or too large, or of another kind.
    """
    if len(pem) > MAX_CERTIFICATE_BYTES:
        raise IdentityError(f"authority: expected at most {MAX_CERTIFICATE_BYTES} bytes, found {len(pem)}")
    try:
        key = (
            load_certificate(pem).public_key()
            if b"-----BEGIN CERTIFICATE-----" in pem
            else serialization.load_pem_public_key(pem)
        )
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(
            "authority: expected a certificate or a public key in PEM form, found something else"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("authority: expected a P-256 key, found one of another kind")
    return key


def authority_to_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key in the form that `authority_of_pem` reads."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _proven(federation: str, site: str, csr_der: bytes) -> bytes:
    return layout("identity", federation, site, hashlib.sha256(csr_der).digest())
