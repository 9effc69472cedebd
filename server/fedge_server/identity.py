"""The authority: it lets sites in, knows who is still welcome, and keeps the federation's CA.

Its folder holds `ca.key` and `ca.pem`, `server.key` and `server.pem`, all 0600 in a folder 0700; its
records are the registry's, in the coordinator's database. Every caller arrives with a client certificate
(TLS demands one); `check` then says, on every call, whether that certificate still counts:

* A certificate counts if it is in its holder's record. One that is not, whoever signed it, does not.
* Enrolling with a token makes the new certificate the site's only one: every earlier one is superseded.
  That is what a re-installed device, or one whose key has leaked, needs.
* Renewing leaves the certificate that asked usable until it expires: a reply that is lost costs nothing.
* Revoking refuses all of a site's certificates and cancels its unused tokens. Only a token that is issued
  afterwards lets it in again.
* Issuing a token cancels the earlier unused ones of that site, so a lost one can be replaced.

No gRPC here: the service calls these methods with the principal that TLS has authenticated.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from fedge.errors import ConfigError, IdentityError
from fedge.files import private_folder, read_capped, write_private
from fedge.principal import (
    Principal,
    Token,
    fingerprint,
    key_of_pem,
    key_to_pem,
    load_certificate,
    principal_of,
)
from fedge_server.certificates import (
    Issuer,
    issue_client,
    issue_server,
    key_of_csr,
    load_issuer,
    make_ca,
    new_key,
    to_pem,
)
from fedge_server.store.registry import Holder, Kind, Registry

DAY_S: Final = 86_400
MAX_TOKEN_S: Final = 30 * DAY_S
_MAX_FILE_BYTES = 64 * 1024
_ASK = "ask the coordinator's operator for a new one (`fedge server token`)"


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate and its private key, as gRPC takes them."""

    principal: Principal
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA of one federation and its records. Safe to use from several processes and threads.

    **Guarantees.** A token enrols at most once, through crashes, restarts and concurrent callers. A
    revocation counts from the next call, in every process. Whatever asks the records blocks, and raises
    StorageError if they cannot be read or changed now: nobody is let in on a guess.
    """

    folder: Path
    issuer: Issuer = field(repr=False)
    registry: Registry = field(repr=False)

    @classmethod
    def create(
        cls, folder: Path, registry: Registry, *, hosts: Iterable[str], now: datetime
    ) -> tuple[Authority, Credential]:
        """A new federation in `folder`: its authority, and the credential of the admin named `admin`.

        `hosts` are the DNS names and IP addresses under which sites reach the coordinator; loopback is
        always among them.

        Raises:
            IdentityError: the folder holds a CA already (it is never overwritten).
            ConfigError: a host is malformed, or the folder cannot be written.
        """
        private_folder(folder)
        if (folder / "ca.key").exists():
            raise IdentityError(f"{folder}: holds a CA already; expected a new folder, or one without ca.key")
        issuer = make_ca(secrets.token_hex(8), now=now)
        authority = cls(folder, issuer, registry)
        authority.issue_server(hosts=hosts, now=now)
        write_private(folder / "ca.pem", authority.ca_pem)
        # Last, since it marks the folder as taken: an interrupted attempt can be repeated.
        write_private(folder / "ca.key", key_to_pem(issuer.key))
        return authority, authority.issue_admin("admin", now=now)

    @classmethod
    def load(cls, folder: Path, registry: Registry) -> Authority:
        """The authority that `create` made in `folder`.

        Raises:
            ConfigError: a file is missing.
            IdentityError: a file is damaged, or others may read the CA's key.
        """
        issuer = load_issuer(_read(folder / "ca.pem"), key_of_pem(_read_key(folder / "ca.key")))
        return cls(folder, issuer, registry)

    @property
    def federation(self) -> str:
        return self.issuer.federation

    @property
    def ca_pem(self) -> bytes:
        return to_pem(self.issuer.certificate)

    def server_credential(self, *, now: datetime) -> Credential:
        """What the coordinator answers with.

        Raises:
            ConfigError, IdentityError: a file is missing, damaged, readable by others or expired.
        """
        certificate = load_certificate(_read(self.folder / "server.pem"))
        key = key_of_pem(_read_key(self.folder / "server.key"))
        principal = principal_of(certificate)
        if certificate.public_key() != key.public_key() or principal.federation != self.federation:
            raise IdentityError(f"{self.folder}: server.pem, server.key and ca.pem do not belong together")
        principal.check(now=now)
        return Credential(principal, to_pem(certificate), key_to_pem(key))

    def issue_server(self, *, hosts: Iterable[str], now: datetime, valid_for_s: float = 730 * DAY_S) -> None:
        """Write a new server key and certificate; a running coordinator keeps its old ones until it restarts.

        Raises:
            ConfigError: a host is malformed.
        """
        key = new_key()
        valid = timedelta(seconds=valid_for_s)
        certificate = issue_server(self.issuer, key.public_key(), hosts=hosts, now=now, valid=valid)
        write_private(self.folder / "server.key", key_to_pem(key))
        write_private(self.folder / "server.pem", to_pem(certificate))

    def issue_admin(self, name: str, *, now: datetime, valid_for_s: float = 365 * DAY_S) -> Credential:
        """A new credential for an admin; it supersedes that admin's earlier ones.

        Raises:
            ConfigError: the name is malformed.
        """
        key, valid = new_key(), timedelta(seconds=valid_for_s)
        certificate = issue_client(
            self.issuer, key.public_key(), role="admin", name=name, now=now, valid=valid
        )
        principal = principal_of(certificate)
        self.registry.add_admin(principal, now=now)
        return Credential(principal, to_pem(certificate), key_to_pem(key))

    def issue_token(self, site: str, *, now: datetime, valid_for_s: float = DAY_S) -> str:
        """One line of text with which `site` can enrol once, for a day unless told otherwise.

        Raises:
            ConfigError: the name is malformed, or the time is not between a second and 30 days.
        """
        if not 1 <= valid_for_s <= MAX_TOKEN_S:
            raise ConfigError(f"valid_for_s: expected 1 to {MAX_TOKEN_S} seconds, found {valid_for_s}")
        key, valid = new_key(), timedelta(seconds=valid_for_s)
        certificate = issue_client(
            self.issuer, key.public_key(), role="enrol", name=site, now=now, valid=valid
        )
        self.registry.add_token(principal_of(certificate), now=now)
        return Token.of(certificate, key, ca_fingerprint=fingerprint(self.issuer.certificate)).encode()

    def enrol(
        self, principal: Principal, csr_der: bytes, *, now: datetime, valid_for_s: float = 90 * DAY_S
    ) -> bytes:
        """The site's first certificate (PEM), for a caller with a bootstrap identity. Spends its token.

        A request that is refused leaves the token unspent.

        Raises:
            IdentityError: the caller brings no token, or one that is used, cancelled, unknown or expired.
            RemoteProtocolError: the request is too large (LimitError), malformed, unsigned or not P-256.
        """
        if principal.role != "enrol":
            raise IdentityError(
                f"expected an enrolment token, found {principal.uri}, which is enrolled already"
            )
        self.check(principal, now=now)
        certificate = self._sign(principal.name, csr_der, now=now, valid_for_s=valid_for_s)
        if not self.registry.enrol(principal, principal_of(certificate), now=now):
            self.check(principal, now=now)  # somebody was faster: say what became of it
            raise IdentityError(f"this token cannot be used: {_ASK}")
        return to_pem(certificate)

    def renew(
        self, principal: Principal, csr_der: bytes, *, now: datetime, valid_for_s: float = 90 * DAY_S
    ) -> bytes:
        """The next certificate (PEM) of a site that is enrolled; the one it asks with stays usable.

        Raises:
            IdentityError: the caller is no site, or its certificate is expired, superseded or revoked.
            RemoteProtocolError: as for `enrol`.
        """
        if principal.role != "site":
            raise IdentityError(f"expected a site's certificate, found {principal.uri}")
        self.check(principal, now=now)
        certificate = self._sign(principal.name, csr_der, now=now, valid_for_s=valid_for_s)
        if not self.registry.renew(principal, principal_of(certificate), now=now):
            self.check(principal, now=now)
            raise IdentityError(f"{principal.uri} cannot be renewed: enrol again")
        return to_pem(certificate)

    def revoke(self, name: str, *, now: datetime, kind: Kind = "site", actor: str = "") -> None:
        """Refuse a site (or an admin) from the next call on, and cancel its unused tokens.

        `actor` is the admin who wants it, for the record.

        Raises:
            ConfigError: there is no such holder, nor an unused token for it.
        """
        self.registry.revoke(kind, name, now=now, actor=actor)

    def sites(self) -> tuple[Holder, ...]:
        """Every site that was ever enrolled, by name."""
        return self.registry.holders("site")

    def check(self, principal: Principal, *, now: datetime) -> None:
        """Ask on every call: TLS checks a certificate when a connection opens, and connections live long.

        Raises:
            IdentityError: it has expired, is not yet valid, or no longer counts; the message says which.
        """
        match principal.role:
            case "enrol":
                principal.check(now=now)
                refusal = self._foreign(principal) or _TOKEN_REFUSALS[self.registry.token_state(principal)]
                if refusal is not None:
                    raise IdentityError(refusal)
            case "site" | "admin":
                self.check_holder(principal, self.registry.holder(principal.role, principal.name), now=now)
            case "coordinator":
                raise IdentityError("the coordinator's own certificate is not for callers")

    def check_holder(self, principal: Principal, holder: Holder | None, *, now: datetime) -> None:
        """As `check`, for a site or an admin whose record was looked up already.

        Raises:
            IdentityError: as for `check`.
        """
        principal.check(now=now)
        refusal = self._foreign(principal) or _holder_refusal(principal, holder)
        if refusal is not None:
            raise IdentityError(refusal)

    def _sign(self, site: str, csr_der: bytes, *, now: datetime, valid_for_s: float) -> x509.Certificate:
        key, valid = key_of_csr(csr_der), timedelta(seconds=valid_for_s)
        return issue_client(self.issuer, key, role="site", name=site, now=now, valid=valid)

    def _foreign(self, principal: Principal) -> str | None:
        if principal.federation == self.federation:
            return None
        return f"expected a certificate of federation {self.federation}, found {principal.uri}"


def _holder_refusal(principal: Principal, holder: Holder | None) -> str | None:
    """Why a certificate does not count; None if it does. Anything that is not known is refused."""
    who = f"{principal.role} {principal.name!r}"
    if holder is None:
        return f"{who} is not enrolled here: {_ASK}"
    if holder.revoked:
        return f"{who} is revoked: {_ASK}"
    if not holder.accepts(principal):
        return f"this certificate of {who} was superseded by a newer enrolment: use that one"
    return None


_TOKEN_REFUSALS: Final = {
    "pending": None,
    "used": f"this token was already used: {_ASK}",
    "cancelled": f"this token was cancelled, by a newer one or because its site was revoked: {_ASK}",
    None: f"this coordinator does not know this token: {_ASK}",
}


def _read(path: Path) -> bytes:
    return read_capped(path, max_bytes=_MAX_FILE_BYTES)


def _read_key(path: Path) -> bytes:
    data = _read(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise IdentityError(f"{path}: expected a file only its owner can read, found {mode:o}: chmod 600 it")
    return data
