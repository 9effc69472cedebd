"""The directory: which identity key is whose, as a list that the federation's CA has signed.

Each line is a statement about one site that is active; a site that is not in the newest directory takes part in no
sum. Its epoch only ever grows, and a site remembers the newest that it has seen: an old list, on which somebody is
active who is not any more, cannot be put in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from fedge.errors import IdentityError
from fedge.principal import CLOCK_SKEW
from fedge.secagg.canonical import digest, layout

KEY_BYTES: Final = 32
MAX_STATEMENTS: Final = 100_000


@dataclass(frozen=True, slots=True, order=True)
class Statement:
    """`site` signs with this Ed25519 public key (32 bytes), between two times in seconds since the epoch of Unix."""

    site: str
    key: bytes
    not_before: int
    not_after: int


@dataclass(frozen=True)
class Directory:
    """The active statements of a federation, by site. Trust one only if `check` has returned it."""

    federation: str
    epoch: int
    statements: tuple[Statement, ...] = field(repr=False)

    @classmethod
    def of(cls, federation: str, epoch: int, statements: Iterable[Statement]) -> Directory:
        return cls(federation, epoch, tuple(sorted(statements)))

    @cached_property
    def _keys(self) -> dict[str, bytes]:
        return {statement.site: statement.key for statement in self.statements}

    def key(self, site: str) -> bytes | None:
        """A site's public key; None if it is not active."""
        return self._keys.get(site)

    @property
    def digest(self) -> bytes:
        """SHA-256 of everything in it: 32 bytes."""
        return digest("directory", *self._fields)

    def sign(self, authority: ec.EllipticCurvePrivateKey) -> bytes:
        """The signature that `check` asks for: ECDSA over P-256 with SHA-256."""
        return authority.sign(layout("directory", *self._fields), ec.ECDSA(SHA256()))

    def check(
        self,
        signature: bytes,
        authority: ec.EllipticCurvePublicKey,
        *,
        federation: str,
        seen: tuple[int, bytes] = (0, b""),
        now_s: float,
    ) -> Directory:
        """This directory with the statements that are valid now, if the authority has signed it and it is not older
        than `seen`: (epoch, digest) of the newest one known.

        Raises:
            IdentityError: it has not, or it is; or it is malformed, or of another federation.
        """
        if self.federation != federation:
            raise IdentityError(
                f"directory of sites: expected one of federation {federation}, found {self.federation[:64]!r}"
            )
        if len(self.statements) > MAX_STATEMENTS or len(self._keys) != len(self.statements):
            raise IdentityError(
                f"directory of sites: expected at most {MAX_STATEMENTS} sites, each of them once"
            )
        if any(len(statement.key) != KEY_BYTES for statement in self.statements):
            raise IdentityError(f"directory of sites: expected keys of {KEY_BYTES} bytes")
        try:
            authority.verify(signature, layout("directory", *self._fields), ec.ECDSA(SHA256()))
        except (InvalidSignature, ValueError):
            raise IdentityError(
                "directory of sites: expected one that this federation's CA has signed, found another"
            ) from None
        epoch, known = seen
        if self.epoch < epoch or (self.epoch == epoch and known and self.digest != known):
            raise IdentityError(
                f"directory of sites: expected epoch {epoch} as it was, or a later one, found "
                f"{'another' if self.epoch == epoch else 'epoch ' + str(self.epoch)}"
            )
        skew = CLOCK_SKEW.total_seconds()
        valid = (each for each in self.statements if each.not_before - skew <= now_s <= each.not_after)
        return replace(self, statements=tuple(valid))

    @property
    def _fields(self) -> tuple[bytes | str | int, ...]:
        lines = (
            part
            for each in sorted(self.statements)
            for part in (each.site, each.key, each.not_before, each.not_after)
        )
        return self.federation, self.epoch, *lines
