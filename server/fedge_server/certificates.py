"""What the authority signs: the CA, the coordinator and client certificates, and requests for them.

Keys, names and dates in, certificates out: no files, no clock, and no opinion about who may have one.
All keys are ECDSA P-256 (gRPC's TLS refuses Ed25519).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.errors import ConfigError, IdentityError, LimitError, RemoteProtocolError
from fedge.principal import CLOCK_SKEW, Role, load_certificate, principal_uri

MAX_CSR_BYTES: Final = 4096
CA_VALID: Final = timedelta(days=3650)

_CA_NAME = "fedge "
_LOCAL = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA's certificate and its key: what signing needs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def federation(self) -> str:
        """The federation's id: 16 hexadecimal digits, carried in the CA's common name.

        Raises:
            IdentityError: this is not a CA that fedge made.
        """
        names = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        match = re.fullmatch(_CA_NAME + r"([0-9a-f]{16})", str(names[0].value)) if len(names) == 1 else None
        if match is None:
            raise IdentityError("expected a CA that `fedge server init` made, found another certificate")
        return match.group(1)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def make_ca(federation: str, *, now: datetime) -> Issuer:
    """A self-signed CA for one federation, valid for ten years; it may sign certificates, not other CAs."""
    key = new_key()
    name = _name(_CA_NAME + federation)
    certificate = (
        _builder(name, name, key.public_key(), now=now, until=now + CA_VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Issuer(certificate, key)


def issue_client(
    issuer: Issuer, key: ec.EllipticCurvePublicKey, *, role: Role, name: str, now: datetime, valid: timedelta
) -> x509.Certificate:
    """A certificate with which a site, an admin or a bootstrap identity may call, and do nothing else."""
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(principal_uri(issuer.federation, role, name))
    ]
    return _issue(issuer, key, _name(name), names, ExtendedKeyUsageOID.CLIENT_AUTH, now=now, valid=valid)


def issue_server(
    issuer: Issuer, key: ec.EllipticCurvePublicKey, *, hosts: Iterable[str], now: datetime, valid: timedelta
) -> x509.Certificate:
    """A certificate with which the coordinator may answer under `hosts` and on loopback.

    Raises:
        ConfigError: a host is neither a DNS name nor an IP address.
    """
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(principal_uri(issuer.federation, "coordinator"))
    ]
    names += [host for host in dict.fromkeys(map(_host, (*_LOCAL, *hosts))) if host is not None]
    subject = _name("coordinator")
    return _issue(issuer, key, subject, names, ExtendedKeyUsageOID.SERVER_AUTH, now=now, valid=valid)


def key_of_csr(der: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate signing request, once it is proven that the sender holds its key.

    Nothing else is taken from the request: subject, names and extensions are the authority's decision.

    Raises:
        LimitError: it is larger than 4 KiB (checked before it is parsed).
        RemoteProtocolError: it is not a request, its key is not P-256, or its signature is wrong.
    """
    if len(der) > MAX_CSR_BYTES:
        raise LimitError(f"certificate request: expected at most {MAX_CSR_BYTES} bytes, found {len(der)}")
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        # The kind is asked before the signature is checked, which for a huge RSA key takes long.
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise RemoteProtocolError("certificate request: expected a P-256 key, found one of another kind")
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise RemoteProtocolError(
            "expected a certificate request in DER form, found something else"
        ) from None
    if not valid:
        raise RemoteProtocolError("certificate request: expected a signature by its own key, found another")
    return key


def to_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_issuer(certificate_pem: bytes, key: ec.EllipticCurvePrivateKey) -> Issuer:
    """A CA from its certificate and key.

    Raises:
        IdentityError: they do not belong together, or are not a fedge CA.
    """
    issuer = Issuer(load_certificate(certificate_pem), key)
    if issuer.certificate.public_key() != key.public_key():
        raise IdentityError("expected a CA certificate and its key, found two that do not match")
    _ = issuer.federation
    return issuer


def _issue(
    issuer: Issuer,
    key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    names: list[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    *,
    now: datetime,
    valid: timedelta,
) -> x509.Certificate:
    # No certificate outlives the CA, or it would fail in a way that nobody can read.
    until = min(now + valid, issuer.certificate.not_valid_after_utc)
    signer = issuer.certificate.public_key()
    assert isinstance(signer, ec.EllipticCurvePublicKey)  # load_issuer and make_ca saw to it
    return (
        _builder(subject, issuer.certificate.subject, key, now=now, until=until)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Backdated, so that a peer whose clock is a little behind does not refuse a fresh certificate.
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName | None:
    """A host as a certificate names it; None for "any address" (0.0.0.0, ::), which nobody dials."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"host: expected a DNS name or an IP address, found {host[:80]!r}") from None
        return x509.DNSName(host)
    return None if address.is_unspecified else x509.IPAddress(address)
