"""How far this site's ledger had come, for the coordinator to keep and not to read.

The coordinator is no party to the ledger; but it is somewhere else, and so it still knows when this site's whole
disk has been put back to an earlier day. Sealed under a key that follows from the site's own: it learns neither
how much there is in the ledger nor whether two are the same.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedge.principal import key_of_pem
from fedge_client.ledger_file import Head

_INFO: Final = b"fedge-ledger-witness/1"
_NONCE_BYTES: Final = 12
_SEQ_BYTES: Final = 8


class Seal:
    """Seals and opens under the site's private key; for one data set.

    **Guarantees.** The key is in no attribute that can be read back, no repr and no error.
    """

    __slots__ = ("_about", "_cipher")

    def __init__(self, key_pem: bytes, dataset: str) -> None:
        secret = key_of_pem(key_pem).private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        key = HKDF(hashes.SHA256(), 32, salt=None, info=_INFO).derive(secret)
        self._cipher = AESGCM(key)
        self._about = _INFO + b"\n" + dataset.encode()

    def close(self, head: Head) -> bytes:
        """What the coordinator is given; another one each time."""
        nonce = os.urandom(_NONCE_BYTES)
        seq, digest = head
        return nonce + self._cipher.encrypt(nonce, seq.to_bytes(_SEQ_BYTES) + digest, self._about)

    def open(self, sealed: bytes) -> Head | None:
        """The head that was sealed; None if it is of another key or data set, or damaged."""
        try:
            opened = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._about)
        except (InvalidTag, ValueError):
            return None
        return int.from_bytes(opened[:_SEQ_BYTES]), opened[_SEQ_BYTES:]
