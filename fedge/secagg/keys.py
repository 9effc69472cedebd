"""Keys of one session, and what two of them agree on: X25519 (RFC 7748), with ML-KEM-768 (FIPS 203) beside it in
suite 2, HKDF-SHA256 (RFC 5869) and AES-256-GCM. Nothing here is of our own making, but for the labels.

Everything a site uses follows from seeds of 32 bytes, so that whoever rebuilds the seed of a mask key from shares can
do what its owner could: agree with the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedge.secagg.canonical import Field, layout

KEY_BYTES = 32
SEED_BYTES = 32
CIPHERTEXT_BYTES = 1088
_X25519_BYTES = 32
_KEM_PUBLIC_BYTES = 1184
_KEM_SEED_BYTES = 64
_NONCE = bytes(12)
"""Each key seals one message."""


class Suite(IntEnum):
    """How keys are agreed on. With the second, whoever keeps today's traffic needs more than a quantum computer
    that breaks X25519."""

    X25519 = 1
    X25519_MLKEM768 = 2

    @property
    def public_bytes(self) -> int:
        """The size of a public key."""
        return _X25519_BYTES + (_KEM_PUBLIC_BYTES if self.has_kem else 0)

    @property
    def ciphertext_bytes(self) -> int:
        """The size of what one side sends the other for them to agree; 0 if nothing needs to be sent."""
        return CIPHERTEXT_BYTES if self.has_kem else 0

    @property
    def has_kem(self) -> bool:
        return self is Suite.X25519_MLKEM768


class BadKeyError(ValueError):
    """A public key with which nothing secret can be agreed on, or one that is none."""


class BadSealError(ValueError):
    """What was sealed was changed, or sealed under another key."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A key pair of a suite. `public` is what others are told.

    **Guarantees.** The private parts are in no repr.
    """

    suite: Suite
    public: bytes
    _x25519: X25519PrivateKey = field(repr=False)
    _kem: MLKEM768PrivateKey | None = field(repr=False)

    @classmethod
    def of(cls, seed: bytes, suite: Suite, purpose: str) -> KeyPair:
        """The pair that follows from a seed of 32 bytes."""
        x25519 = X25519PrivateKey.from_private_bytes(derive(seed, _X25519_BYTES, "x25519", purpose))
        public = x25519.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        if not suite.has_kem:
            return cls(suite, public, x25519, None)
        kem = MLKEM768PrivateKey.from_seed_bytes(derive(seed, _KEM_SEED_BYTES, "ml-kem-768", purpose))
        return cls(suite, public + kem.public_key().public_bytes_raw(), x25519, kem)

    def agree(self, peer: bytes) -> bytes:
        """The X25519 secret with the owner of a public key of this suite: 32 bytes.

        Raises:
            BadKeyError: it is of another size or of low order.
        """
        if len(peer) != self.suite.public_bytes:
            raise BadKeyError(f"expected a public key of {self.suite.public_bytes} bytes, found {len(peer)}")
        try:
            return self._x25519.exchange(X25519PublicKey.from_public_bytes(peer[:_X25519_BYTES]))
        except ValueError:
            raise BadKeyError("expected a public key, found one of low order") from None

    def encapsulate(self, peer: bytes) -> tuple[bytes, bytes]:
        """(secret, ciphertext) for the owner of a public key; both empty in a suite without a KEM.

        Raises:
            BadKeyError: the KEM's part of it is none.
        """
        if not self.suite.has_kem:
            return b"", b""
        try:
            return MLKEM768PublicKey.from_public_bytes(peer[_X25519_BYTES:]).encapsulate()
        except ValueError:
            raise BadKeyError("expected an ML-KEM-768 public key, found something else") from None

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The secret that the other side has encapsulated; empty in a suite without a KEM.

        Raises:
            BadSealError: the ciphertext is of another size.
        """
        if len(ciphertext) != self.suite.ciphertext_bytes:
            raise BadSealError(
                f"expected a ciphertext of {self.suite.ciphertext_bytes} bytes, found {len(ciphertext)}"
            )
        return self._kem.decapsulate(ciphertext) if self._kem is not None else b""


def derive(secret: bytes, size: int, *label: Field, salt: bytes = b"") -> bytes:
    """HKDF-SHA256: `size` bytes that follow from a secret, under a label."""
    return HKDF(SHA256(), size, salt, layout("derive", *label)).derive(secret)


def seal(key: bytes, message: bytes, *bound: Field) -> bytes:
    """AES-256-GCM under a key that seals nothing else; `bound` is authenticated with the message."""
    return AESGCM(key).encrypt(_NONCE, message, layout("seal", *bound))


def open_seal(key: bytes, sealed: bytes, *bound: Field) -> bytes:
    """What was sealed.

    Raises:
        BadSealError: it, or what is bound to it, is not what was sealed under this key.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, layout("seal", *bound))
    except InvalidTag:
        raise BadSealError("expected what was sealed under this key, found something else") from None
