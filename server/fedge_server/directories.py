"""The directory of a federation as its coordinator has it: what is signed, and what has to be.

Either the federation's CA signs it here, in the transaction of each change; or an authority apart does, on another
machine, and what it has signed is taken from a file. The coordinator then cannot put a key of its own in the place
of a site's, whatever becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import ConfigError, RunError
from fedge.secagg.directory import Directory, Statement
from fedge.signing import SignedDirectory
from fedge_server.store.directories import Signing, is_signed
from fedge_server.store.registry import Registry

_EXPORT = "`fedge server directory export`, then sign and import it"


@dataclass(frozen=True, slots=True)
class Changes:
    """What one list of statements has that another has not, by site."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    rekeyed: tuple[str, ...] = ()
    """Sites that sign with another key than before."""
    extended: tuple[str, ...] = ()
    """Sites whose statement is valid for longer than before, and otherwise the same."""

    @classmethod
    def between(cls, old: tuple[Statement, ...], new: tuple[Statement, ...]) -> Changes:
        before, after = ({each.site: each for each in statements} for statements in (old, new))
        both = sorted(before.keys() & after.keys())
        kept = [site for site in both if before[site].key == after[site].key]
        return cls(
            added=tuple(sorted(after.keys() - before.keys())),
            removed=tuple(sorted(before.keys() - after.keys())),
            rekeyed=tuple(site for site in both if before[site].key != after[site].key),
            extended=tuple(site for site in kept if before[site].not_after < after[site].not_after),
        )

    @property
    def any(self) -> bool:
        return bool(self.added or self.removed or self.rekeyed or self.extended)


@dataclass(frozen=True, slots=True)
class Directories:
    """`authority` is whose signature counts. With `signing` it is the coordinator that signs; without, somebody else.

    **Guarantees.** The epoch only grows, and no two directories have the same one, through crashes, restarts and
    concurrent callers. Calls block, and raise StorageError if the records cannot be used.
    """

    federation: str
    authority: ec.EllipticCurvePublicKey = field(repr=False)
    registry: Registry = field(repr=False)
    signing: Signing | None = field(repr=False)

    @property
    def apart(self) -> bool:
        """Whether the directory is signed elsewhere."""
        return self.signing is None

    def newest(self) -> SignedDirectory:
        """The newest directory that the authority has signed.

        Raises:
            RunError: there is none yet; it says what the coordinator's operator has to do.
        """
        found = self.registry.directory(self.federation)
        if found is None:
            raise RunError(
                f"the directory of sites' keys is not signed yet: its operator has to {self._remedy}"
            )
        if not is_signed(found, self.authority):
            raise RunError(
                f"the directory of sites' keys, epoch {found.directory.epoch}, is not signed by the authority that "
                f"counts now: its operator has to {self._remedy}"
            )
        return found

    def pending(self, *, now: datetime) -> Directory:
        """The directory that has to be signed next: everybody who is active, and the next epoch."""
        return self.registry.pending_directory(self.federation, now=now)

    def changes(self, *, now: datetime) -> Changes:
        """What is not in the newest directory of the authority yet."""
        try:
            signed = self.newest().directory.statements
        except RunError:
            signed = ()
        return Changes.between(signed, self.pending(now=now).statements)

    def settle(self, *, now: datetime) -> None:
        """Sign the directory if that is the coordinator's to do and the newest one does not say what is so."""
        if self.signing is not None:
            self.registry.sign(self.signing, now=now)

    def renew(self, *, now: datetime) -> SignedDirectory:
        """Sign the directory anew, with a higher epoch, although nothing may have changed.

        Raises:
            ConfigError: it is signed elsewhere.
        """
        if self.signing is None:
            raise ConfigError(
                f"expected a coordinator that signs by itself, found a [directory] authority in server.toml: {_EXPORT}"
            )
        self.registry.sign(self.signing, now=now, anew=True)
        return self.newest()

    def take(self, signed: SignedDirectory, *, now: datetime) -> None:
        """Make a directory that was signed elsewhere the newest one.

        Raises:
            ConfigError: the coordinator signs by itself.
            IdentityError: the authority has not signed it, it is of another federation, or its epoch is not beyond
                the newest one's.
        """
        if self.signing is not None:
            raise ConfigError(
                "expected a [directory] authority in server.toml, found none: the coordinator signs by itself, and "
                "takes no directory from elsewhere"
            )
        signed.directory.check(
            signed.signature, self.authority, federation=self.federation, now_s=now.timestamp()
        )
        self.registry.keep_directory(signed, now=now)

    @property
    def _remedy(self) -> str:
        return f"run {_EXPORT}" if self.apart else "start the coordinator again"
