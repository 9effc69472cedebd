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

A site enrols with the key with which it signs, too, and keeps that until it enrols again. Each change to who is
active is one to the directory of these keys (directories.py).

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
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import ConfigError, IdentityError
from fedge.files import private_folder, write_private
from fedge.principal import (
    Principal,
    Token,
    fingerprint,
    key_of_pem,
    key_to_pem,
    load_certificate,
    principal_of,
)
from fedge.signing import check_proof
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
from fedge_server.directories import Directories
from fedge_server.key_files import read_key, read_pem
from fedge_server.refusals import ASK, TOKEN_REFUSALS, holder_refusal
from fedge_server.store.directories import Signing
from fedge_server.store.registry import Holder, Kind, Registry

DAY_S: Final = 86_400
MAX_TOKEN_S: Final = 30 * DAY_S


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate and its private key, as gRPC takes them."""

    principal: Principal
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA of one federation and its records. Safe to use from several processes and threads.

    `apart` is the key that signs the directory of sites' keys elsewhere; without one, the CA's does it here.

    **Guarantees.** A token enrols at most once, through crashes, restarts and concurrent callers. A
    revocation counts from the next call, in every process. Whatever asks the records blocks, and raises
    StorageError if they cannot be read or changed now: nobody is let in on a guess.
    """

    folder: Path
    issuer: Issuer = field(repr=False)
    registry: Registry = field(repr=False)
    apart: ec.EllipticCurvePublicKey | None = field(default=None, repr=False)

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
    def load(
        cls, folder: Path, registry: Registry, *, apart: ec.EllipticCurvePublicKey | None = None
    ) -> Authority:
        """The authority that `create` made in `folder`.

        Raises:
            ConfigError: a file is missing.
            IdentityError: a file is damaged, or others may read the CA's key.
        """
        issuer = load_issuer(read_pem(folder / "ca.pem"), key_of_pem(read_key(folder / "ca.key")))
        return cls(folder, issuer, registry, apart)

    @property
    def federation(self) -> str:
        return self.issuer.federation

    @property
    def ca_pem(self) -> bytes:
        return to_pem(self.issuer.certificate)

    @property
    def directories(self) -> Directories:
        """The directory of the sites' keys: what is signed, and what has to be."""
        authority = self.apart or self.issuer.key.public_key()
        return Directories(self.federation, authority, self.registry, self._signing)

    @property
    def _signing(self) -> Signing | None:
        return Signing(self.federation, self.issuer.key) if self.apart is None else None

    def server_credential(self, *, now: datetime) -> Credential:
        """What the coordinator answers with.

        Raises:
            ConfigError, IdentityError: a file is missing, damaged, readable by others or expired.
        """
        certificate = load_certificate(read_pem(self.folder / "server.pem"))
        key = key_of_pem(read_key(self.folder / "server.key"))
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
        self,
        principal: Principal,
        csr_der: bytes,
        *,
        key: bytes,
        proof: bytes,
        now: datetime,
        valid_for_s: float = 90 * DAY_S,
    ) -> bytes:
        """The site's first certificate (PEM), for a caller with a bootstrap identity. Spends its token.

        `key` is the one with which the site is going to sign (Ed25519), `proof` its signature over this very
        request. A request that is refused leaves the token unspent.

        Raises:
            IdentityError: the caller brings no token, or one that is used, cancelled, unknown or expired; or
                a key that is another site's.
            RemoteProtocolError: the request is too large (LimitError), malformed, unsigned or not P-256; or
                it does not come with a key that it proves.
        """
        if principal.role != "enrol":
            raise IdentityError(
                f"expected an enrolment token, found {principal.uri}, which is enrolled already"
            )
        self.check(principal, now=now)
        self._check_proof(principal.name, csr_der, key, proof)
        certificate = self._sign(principal.name, csr_der, now=now, valid_for_s=valid_for_s)
        granted = principal_of(certificate)
        if not self.registry.enrol(principal, granted, key=key, now=now, signing=self._signing):
            self.check(principal, now=now)  # somebody was faster: say what became of it
            raise IdentityError(f"this token cannot be used: {ASK}")
        return to_pem(certificate)

    def renew(
        self,
        principal: Principal,
        csr_der: bytes,
        *,
        key: bytes = b"",
        proof: bytes = b"",
        now: datetime,
        valid_for_s: float = 90 * DAY_S,
    ) -> bytes:
        """The next certificate (PEM) of a site that is enrolled; the one it asks with stays usable.

        The site goes on signing with the key that it enrolled with: `key` and `proof` are that one's, or empty.

        Raises:
            IdentityError: the caller is no site, or its certificate is expired, superseded or revoked; or the
                key is not the one that is known.
            RemoteProtocolError: as for `enrol`.
        """
        if principal.role != "site":
            raise IdentityError(f"expected a site's certificate, found {principal.uri}")
        self.check(principal, now=now)
        if key or proof:
            self._check_proof(principal.name, csr_der, key, proof)
        certificate = self._sign(principal.name, csr_der, now=now, valid_for_s=valid_for_s)
        granted = principal_of(certificate)
        if not self.registry.renew(principal, granted, key=key, now=now, signing=self._signing):
            self.check(principal, now=now)
            raise IdentityError(f"{principal.uri} cannot be renewed: enrol again")
        return to_pem(certificate)

    def revoke(self, name: str, *, now: datetime, kind: Kind = "site", actor: str = "") -> None:
        """Refuse a site (or an admin) from the next call on, and cancel its unused tokens.

        `actor` is the admin who wants it, for the record.

        Raises:
            ConfigError: there is no such holder, nor an unused token for it.
        """
        self.registry.revoke(kind, name, now=now, actor=actor, signing=self._signing)

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
                refusal = self._foreign(principal) or TOKEN_REFUSALS[self.registry.token_state(principal)]
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
        refusal = self._foreign(principal) or holder_refusal(principal, holder)
        if refusal is not None:
            raise IdentityError(refusal)

    def _check_proof(self, site: str, csr_der: bytes, key: bytes, proof: bytes) -> None:
        check_proof(key, proof, federation=self.federation, site=site, csr_der=csr_der)

    def _sign(self, site: str, csr_der: bytes, *, now: datetime, valid_for_s: float) -> x509.Certificate:
        key, valid = key_of_csr(csr_der), timedelta(seconds=valid_for_s)
        return issue_client(self.issuer, key, role="site", name=site, now=now, valid=valid)

    def _foreign(self, principal: Principal) -> str | None:
        if principal.federation == self.federation:
            return None
        return f"expected a certificate of federation {self.federation}, found {principal.uri}"
