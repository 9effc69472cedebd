"""The site's identity: how it asks for one, what it accepts as one, and where it is kept.

The private key is made here and never leaves the device: a request (CSR) goes out, a certificate comes
back. They live in one folder (0700) as `client.key`, `client.pem` and `ca.pem` (0600). Sending the request
is the link's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import ConfigError, IdentityError
from fedge.files import private_folder, read_capped, write_private
from fedge.principal import (
    MAX_CERTIFICATE_BYTES,
    Principal,
    Token,
    fingerprint,
    key_of_pem,
    key_to_pem,
    load_certificate,
    principal_of,
)

_KEY, _CERTIFICATE, _CA = "client.key", "client.pem", "ca.pem"
_ENROL = "enrol this site with a new token (`fedge client enrol`)"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this site is to its coordinator, checked: key, certificate and CA belong together.

    **Guarantees.** The key is in no repr and no error message.
    """

    principal: Principal
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)

    @property
    def site(self) -> str:
        return self.principal.name

    @property
    def federation(self) -> str:
        return self.principal.federation


def open_token(text: str, *, ca_pem: bytes, now: datetime) -> Token:
    """The token that an operator pasted, once it is sure that it can be used with this CA file.

    Checked before connecting, since a TLS handshake that fails cannot say why.

    Raises:
        IdentityError: it is no token, damaged, expired, or of another coordinator than the CA file.
    """
    token = Token.decode(text)
    try:
        ca = load_certificate(ca_pem)
    except IdentityError as error:
        raise IdentityError(f"CA file: {error}") from None
    found = fingerprint(ca)
    if token.ca_fingerprint != found:
        raise IdentityError(
            f"token and CA file are of different coordinators: expected a CA with the fingerprint "
            f"{token.ca_fingerprint.hex()[:16]}..., found {found.hex()[:16]}...: take ca.pem from the "
            "coordinator that made the token"
        )
    _check_issued(load_certificate(token.certificate_pem), ca)
    token.principal.check(now=now)
    return token


def make_csr(key_pem: bytes | None = None) -> tuple[bytes, bytes]:
    """(private key as PEM, certificate request as DER). Without a key, a new P-256 key is made.

    To renew, pass the key in use: then only `client.pem` changes, in one atomic step, and no crash can
    leave a key beside a certificate of another.

    Raises:
        IdentityError: the key is not an unencrypted P-256 key.
    """
    key = ec.generate_private_key(ec.SECP256R1()) if key_pem is None else key_of_pem(key_pem)
    # It names nobody: the coordinator takes the name from the token, and only the key from here.
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return key_to_pem(key), request.public_bytes(serialization.Encoding.DER)


def accept_certificate(
    certificate_pem: bytes, *, key_pem: bytes, ca_pem: bytes, site: str, now: datetime
) -> Identity:
    """The identity that a coordinator's reply to an enrolment or a renewal gives.

    Raises:
        IdentityError: the certificate is malformed, for another key, site or role, not signed by this CA,
            or not valid now.
    """
    identity = _identity(certificate_pem, key_pem=key_pem, ca_pem=ca_pem)
    if identity.site != site:
        raise IdentityError(f"expected a certificate for site {site!r}, found one for {identity.site!r}")
    identity.principal.check(now=now)
    return identity


def save_identity(folder: Path, identity: Identity) -> None:
    """Write the three files into `folder` (0700), each 0600 and in one piece, the certificate last.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    private_folder(folder)
    write_private(folder / _KEY, identity.key_pem)
    write_private(folder / _CA, identity.ca_pem)
    write_private(folder / _CERTIFICATE, identity.certificate_pem)


def load_identity(folder: Path, *, now: datetime) -> Identity:
    """The identity in `folder`.

    Raises:
        IdentityError: a file is missing, damaged or belongs to another; others can read the key; or the
            certificate has expired.
    """
    try:
        key, certificate, ca = (
            read_capped(folder / name, max_bytes=MAX_CERTIFICATE_BYTES) for name in (_KEY, _CERTIFICATE, _CA)
        )
    except ConfigError as error:
        raise IdentityError(f"{error}: {_ENROL}") from None
    mode = (folder / _KEY).stat().st_mode & 0o777
    if mode & 0o077:
        raise IdentityError(
            f"{folder / _KEY}: expected a file that only its owner can read (600), found {mode:o}: "
            f"run chmod 600 {folder / _KEY}"
        )
    try:
        identity = _identity(certificate, key_pem=key, ca_pem=ca)
        identity.principal.check(now=now)
    except IdentityError as error:
        raise IdentityError(f"{folder}: {error}") from None
    return identity


def _identity(certificate_pem: bytes, *, key_pem: bytes, ca_pem: bytes) -> Identity:
    certificate, ca, key = load_certificate(certificate_pem), load_certificate(ca_pem), key_of_pem(key_pem)
    _check_issued(certificate, ca)
    principal = principal_of(certificate)
    if principal.role != "site":
        raise IdentityError(f"expected a site's certificate, found {principal.uri}: {_ENROL}")
    if certificate.public_key() != key.public_key():
        raise IdentityError(
            f"expected a certificate for this site's key, found one for another key: {_ENROL}"
        )
    return Identity(principal, key_pem=key_pem, certificate_pem=certificate_pem, ca_pem=ca_pem)


def _check_issued(certificate: x509.Certificate, ca: x509.Certificate) -> None:
    """Refuse a certificate that this CA did not sign. There are no CAs in between: the chain is one step."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise IdentityError(
            "expected a certificate signed by the coordinator's CA (ca.pem), found another"
        ) from None
