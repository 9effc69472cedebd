"""The site's identity: how it asks for one, what it accepts as one, and where it is kept.

The private keys are made here and never leave the device: a request (CSR) goes out, a certificate comes
back. They live in one folder (0700): `client.key`, `client.pem` and `ca.pem` are for the link, `signing.key`
is what this site signs with in secure aggregation, and `authority.pem`, if it is there, is whose signature the
directory of the sites' keys has to have (else the CA's). All are 0600. Sending the request is the link's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
from fedge.signing import authority_of_pem, signing_key_of_pem

_KEY, _SIGNING, _CERTIFICATE, _CA = "client.key", "signing.key", "client.pem", "ca.pem"
_AUTHORITY = "authority.pem"
_ENROL = "enrol this site with a new token (`fedge client enrol`)"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this site is to its coordinator, checked: key, certificate and CA belong together.

    **Guarantees.** The keys are in no repr and no error message.
    """

    principal: Principal
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)
    signing_pem: bytes = field(repr=False)
    authority_pem: bytes | None = field(default=None, repr=False)
    """Without one, the CA is the authority."""

    @property
    def signing(self) -> Ed25519PrivateKey:
        """The key with which this site signs in secure aggregation."""
        return signing_key_of_pem(self.signing_pem)

    @property
    def authority(self) -> ec.EllipticCurvePublicKey:
        """Whose signature the directory of the sites' keys has to have."""
        return authority_of_pem(self.ca_pem if self.authority_pem is None else self.authority_pem)

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
    certificate_pem: bytes,
    *,
    key_pem: bytes,
    signing_pem: bytes,
    ca_pem: bytes,
    authority_pem: bytes | None = None,
    site: str,
    now: datetime,
) -> Identity:
    """The identity that a coordinator's reply to an enrolment gives.

    Raises:
        IdentityError: the certificate is malformed, for another key, site or role, not signed by this CA,
            or not valid now.
    """
    identity = _identity(
        certificate_pem, key_pem=key_pem, signing_pem=signing_pem, ca_pem=ca_pem, authority_pem=authority_pem
    )
    if identity.site != site:
        raise IdentityError(f"expected a certificate for site {site!r}, found one for {identity.site!r}")
    identity.principal.check(now=now)
    return identity


def accept_renewal(old: Identity, certificate_pem: bytes, *, now: datetime) -> Identity:
    """The identity that a coordinator's reply to a renewal gives: the same keys, and a new certificate.

    Raises:
        IdentityError: as for `accept_certificate`.
    """
    return accept_certificate(
        certificate_pem,
        key_pem=old.key_pem,
        signing_pem=old.signing_pem,
        ca_pem=old.ca_pem,
        authority_pem=old.authority_pem,
        site=old.site,
        now=now,
    )


def save_identity(folder: Path, identity: Identity) -> None:
    """Write the files into `folder` (0700), each 0600 and in one piece.

    The link's key goes first and its certificate last: cut off in between, they do not match, and that is found.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    private_folder(folder)
    write_private(folder / _KEY, identity.key_pem)
    write_private(folder / _SIGNING, identity.signing_pem)
    if identity.authority_pem is not None:
        write_private(folder / _AUTHORITY, identity.authority_pem)
    write_private(folder / _CA, identity.ca_pem)
    write_private(folder / _CERTIFICATE, identity.certificate_pem)


def load_identity(folder: Path, *, now: datetime) -> Identity:
    """The identity in `folder`.

    Raises:
        IdentityError: a file is missing, damaged or belongs to another; others can read a key; or the
            certificate has expired.
    """
    try:
        key, signing, certificate, ca = (
            read_capped(folder / name, max_bytes=MAX_CERTIFICATE_BYTES)
            for name in (_KEY, _SIGNING, _CERTIFICATE, _CA)
        )
        authority = load_authority_pem(folder)
    except ConfigError as error:
        raise IdentityError(f"{error}: {_ENROL}") from None
    for name in (_KEY, _SIGNING):
        _check_private(folder / name)
    try:
        identity = _identity(
            certificate, key_pem=key, signing_pem=signing, ca_pem=ca, authority_pem=authority
        )
        identity.principal.check(now=now)
    except IdentityError as error:
        raise IdentityError(f"{folder}: {error}") from None
    return identity


def load_authority_pem(folder: Path) -> bytes | None:
    """The authority apart that this folder's site was told to trust, if it was.

    Raises:
        ConfigError: it is there and cannot be read.
    """
    path = folder / _AUTHORITY
    return read_capped(path, max_bytes=MAX_CERTIFICATE_BYTES) if path.exists() else None


def _check_private(path: Path) -> None:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise IdentityError(
            f"{path}: expected a file that only its owner can read (600), found {mode:o}: run chmod 600 {path}"
        )


def _identity(
    certificate_pem: bytes, *, key_pem: bytes, signing_pem: bytes, ca_pem: bytes, authority_pem: bytes | None
) -> Identity:
    certificate, ca, key = load_certificate(certificate_pem), load_certificate(ca_pem), key_of_pem(key_pem)
    _check_issued(certificate, ca)
    principal = principal_of(certificate)
    if principal.role != "site":
        raise IdentityError(f"expected a site's certificate, found {principal.uri}: {_ENROL}")
    if certificate.public_key() != key.public_key():
        raise IdentityError(
            f"expected a certificate for this site's key, found one for another key: {_ENROL}"
        )
    identity = Identity(principal, key_pem, certificate_pem, ca_pem, signing_pem, authority_pem)
    _ = identity.signing, identity.authority  # they are what they should be
    return identity


def _check_issued(certificate: x509.Certificate, ca: x509.Certificate) -> None:
    """Refuse a certificate that this CA did not sign. There are no CAs in between: the chain is one step."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise IdentityError(
            "expected a certificate signed by the coordinator's CA (ca.pem), found another"
        ) from None
