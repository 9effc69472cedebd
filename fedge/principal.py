"""Who is calling: the identity in a certificate, and the one-time token that lets a site get one.

The coordinator has one port and asks every connection for a client certificate, enrolment included
(gRPC's Python server cannot ask for one optionally). So an enrolment token carries a short-lived
*bootstrap* certificate and its key; that identity may call Enrol, once, and nothing else.

A certificate names its holder in exactly one URI: `fedge://<federation>/site/<name>`, `.../admin/<name>`,
`.../enrol/<site>` or `.../coordinator`. Values and pure steps only: the authority that signs and the
files that hold keys belong to the server and the client, and TLS has checked the signature before any
of this is asked.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import ConfigError, IdentityError

Role = Literal["site", "admin", "enrol", "coordinator"]

MAX_CERTIFICATE_BYTES: Final = 16 * 1024
MAX_TOKEN_CHARS: Final = 2048
CLOCK_SKEW: Final = timedelta(minutes=5)

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_URI = re.compile(rf"fedge://([0-9a-f]{{16}})/(?:(coordinator)|(site|admin|enrol)/({_NAME}))")

_PREFIX = "fedge1."
_CHECKSUM_BYTES = 8
_FINGERPRINT_BYTES = 32
_SCALAR_BYTES = 32


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of a certificate. `name` is a site's or an admin's, and empty for the coordinator;
    for the role `enrol` it is the site that may be enrolled.

    Trust one only if its certificate came out of a TLS handshake that demanded it, or was checked
    against the CA: parsing proves nothing.
    """

    federation: str
    role: Role
    name: str
    serial: int
    not_before: datetime
    not_after: datetime

    @property
    def uri(self) -> str:
        return principal_uri(self.federation, self.role, self.name)

    def check(self, *, now: datetime) -> None:
        """Refuse outside the period of validity; a start up to 5 minutes ahead is a clock's error.

        Raises:
            IdentityError: it has expired, or is not yet valid.
        """
        what = f"the token for site {self.name!r}" if self.role == "enrol" else f"the certificate {self.uri}"
        if now > self.not_after:
            raise IdentityError(f"{what} expired at {_utc(self.not_after)}: {_REMEDY[self.role]}")
        if now + CLOCK_SKEW < self.not_before:
            raise IdentityError(
                f"{what} is valid from {_utc(self.not_before)}, it is {_utc(now)}: set this machine's clock"
            )


_REMEDY: Final[dict[Role, str]] = {
    "site": "enrol again with a new token (`fedge client enrol`)",
    "admin": "ask the coordinator's operator for a new admin credential",
    "enrol": "ask the coordinator's operator for a new one (`fedge server token`)",
    "coordinator": "the coordinator's operator must renew it",
}


def check_name(name: str, *, what: str = "site") -> str:
    """`name`, if it may name a site or an admin: 1 to 63 of A-Z a-z 0-9 . _ - and no punctuation first.

    Raises:
        ConfigError: it may not. Such a name is safe as a file name and inside a URI; others are not.
    """
    if not re.fullmatch(_NAME, name):
        raise ConfigError(
            f"{what} name: expected 1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit, "
            f"found {name[:80]!r}"
        )
    return name


def principal_uri(federation: str, role: Role, name: str = "") -> str:
    """The URI that a certificate of this holder carries."""
    tail = (
        "" if role == "coordinator" else f"/{check_name(name, what='admin' if role == 'admin' else 'site')}"
    )
    return f"fedge://{federation}/{role}{tail}"


def load_certificate(pem: bytes | str) -> x509.Certificate:
    """The one certificate in a PEM text of at most 16 KiB.

    Raises:
        IdentityError: it is too large, not PEM, or holds none or several (of two, which is meant?).
    """
    data = pem.encode("utf-8", "replace") if isinstance(pem, str) else pem
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise IdentityError(f"certificate: expected at most {MAX_CERTIFICATE_BYTES} bytes, found {len(data)}")
    try:
        certificates = x509.load_pem_x509_certificates(data)
    except (ValueError, x509.InvalidVersion):
        raise IdentityError("expected a certificate in PEM form, found something else") from None
    if len(certificates) != 1:
        raise IdentityError(f"expected exactly one certificate, found {len(certificates)}")
    return certificates[0]


def fingerprint(certificate: bytes | str | x509.Certificate) -> bytes:
    """SHA-256 of a certificate's DER form: 32 bytes."""
    if not isinstance(certificate, x509.Certificate):
        certificate = load_certificate(certificate)
    return certificate.fingerprint(hashes.SHA256())


def principal_of(certificate: bytes | str | x509.Certificate) -> Principal:
    """The holder that a certificate (PEM, or parsed) names.

    Raises:
        IdentityError: it is not a certificate, or does not carry exactly one well-formed fedge URI.
    """
    if not isinstance(certificate, x509.Certificate):
        certificate = load_certificate(certificate)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        uris = []
    # Compared without case, so that a second URI in odd spelling counts as a second one.
    found = [uri for uri in uris if uri.lower().startswith("fedge:")]
    match = _URI.fullmatch(found[0]) if len(found) == 1 else None
    if match is None:
        raise IdentityError(f"expected a certificate with exactly one fedge:// URI, found {found[:2]!r}")
    federation, coordinator, role, name = match.groups()
    return Principal(
        federation=federation,
        role=cast("Role", coordinator or role),
        name=name or "",
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


@dataclass(frozen=True, slots=True)
class Token:
    """A one-time enrolment token: a bootstrap identity, and the fingerprint of the CA that made it.

    As text it is one line: `fedge1.` and URL-safe base64 of checksum (8 bytes of SHA-256) | CA
    fingerprint (32) | P-256 private scalar (32, big-endian) | certificate (DER). The checksum catches a
    bad paste, not an attacker: whether a token counts is the coordinator's decision alone.

    **Guarantees.** The key is in no repr and no error message.
    """

    ca_fingerprint: bytes
    principal: Principal
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)

    @property
    def site(self) -> str:
        return self.principal.name

    @classmethod
    def of(
        cls, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, *, ca_fingerprint: bytes
    ) -> Token:
        """The token of a bootstrap certificate and its key.

        Raises:
            IdentityError: the certificate is for another role, or for another key.
        """
        principal = principal_of(certificate)
        if principal.role != "enrol":
            raise IdentityError(f"expected a token for enrolment, found one for {principal.uri}")
        if certificate.public_key() != key.public_key():
            raise IdentityError("expected a token whose certificate and key match, found two that do not")
        return cls(
            ca_fingerprint=ca_fingerprint,
            principal=principal,
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
            key_pem=key_to_pem(key),
        )

    def encode(self) -> str:
        """The token as one line of text."""
        scalar = key_of_pem(self.key_pem).private_numbers().private_value.to_bytes(_SCALAR_BYTES, "big")
        der = load_certificate(self.certificate_pem).public_bytes(serialization.Encoding.DER)
        body = self.ca_fingerprint + scalar + der
        return _PREFIX + base64.urlsafe_b64encode(_checksum(body) + body).rstrip(b"=").decode()

    @classmethod
    def decode(cls, text: str) -> Token:
        """The token in a line of text; white space around it is ignored.

        Raises:
            IdentityError: it is not a token, is damaged, or its parts do not belong together.
        """
        text = text.strip()
        if not text.startswith(_PREFIX):
            raise IdentityError(f"expected a token, which starts with {_PREFIX!r}, found something else")
        if len(text) > MAX_TOKEN_CHARS:
            raise IdentityError(f"token: expected at most {MAX_TOKEN_CHARS} characters, found {len(text)}")
        damaged = IdentityError("damaged token: paste the whole line that `fedge server token` printed")
        encoded = text.removeprefix(_PREFIX)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", encoded) or len(encoded) % 4 == 1:
            raise damaged
        data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        checksum, body = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
        if not hmac.compare_digest(checksum, _checksum(body)):
            raise damaged
        ca, scalar = body[:_FINGERPRINT_BYTES], body[_FINGERPRINT_BYTES : _FINGERPRINT_BYTES + _SCALAR_BYTES]
        try:
            key = ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP256R1())
            certificate = x509.load_der_x509_certificate(body[_FINGERPRINT_BYTES + _SCALAR_BYTES :])
            token = cls.of(certificate, key, ca_fingerprint=ca)
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise damaged from None
        if token.encode() != text:  # One token has one spelling: no spare bits, no second encoding.
            raise damaged
        return token


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8 PEM, the form that gRPC takes."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_of_pem(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The P-256 private key in a PEM text.

    Raises:
        IdentityError: it is not an unencrypted private key, or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError("expected an unencrypted private key in PEM form, found something else") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("expected a P-256 private key, found one of another kind")
    return key


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(_PREFIX.encode() + body).digest()[:_CHECKSUM_BYTES]


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
