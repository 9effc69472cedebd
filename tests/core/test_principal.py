"""Who a certificate names, and the token's text. The certificates here are built by hand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import string
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError, FedgeError, IdentityError
from fedge.principal import (
    MAX_CERTIFICATE_BYTES,
    Principal,
    Role,
    Token,
    check_name,
    fingerprint,
    key_of_pem,
    key_to_pem,
    load_certificate,
    principal_of,
    principal_uri,
)

NOW = datetime(2025, 6, 1, 12, 0, tzinfo=UTC)
FEDERATION = "0123456789abcdef"
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(*uris: str, key: ec.EllipticCurvePrivateKey = KEY, dns: str = "") -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "anyone")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    if dns:
        names.append(x509.DNSName(dns))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256())


def pem(found: x509.Certificate) -> bytes:
    return found.public_bytes(serialization.Encoding.PEM)


def token(site: str = "icu-1") -> Token:
    enrol = certificate(principal_uri(FEDERATION, "enrol", site))
    return Token.of(enrol, KEY, ca_fingerprint=hashlib.sha256(b"some CA").digest())


@pytest.mark.parametrize(
    ("role", "name"),
    [("site", "icu-1"), ("admin", "a"), ("enrol", "Ward_7.b"), ("coordinator", ""), ("site", "9" * 63)],
)
def test_a_principal_is_what_its_uri_says(role: Role, name: str) -> None:
    uri = principal_uri(FEDERATION, role, name)
    expected = Principal(FEDERATION, role, name, 7, NOW, NOW + timedelta(days=1))
    for source in (certificate(uri), pem(certificate(uri)), pem(certificate(uri)).decode()):
        assert principal_of(source) == expected
    assert expected.uri == uri


def test_names_of_other_kinds_beside_the_uri_do_not_matter() -> None:
    found = certificate(principal_uri(FEDERATION, "coordinator"), "https://example.org", dns="localhost")
    assert principal_of(found).role == "coordinator"


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://example.org"],
        [f"fedge://{FEDERATION}/site/a", f"fedge://{FEDERATION}/admin/a"],
        [f"fedge://{FEDERATION}/site/a", "FEDGE:anything"],
        [f"fedge://{FEDERATION}/site/a\n"],
        [f"fedge://{FEDERATION}/site/a/b"],
        [f"fedge://{FEDERATION}/site/a?b"],
        [f"fedge://{FEDERATION}/site/%61"],
        [f"fedge://{FEDERATION}/site/../admin"],
        [f"fedge://{FEDERATION}/site/"],
        [f"fedge://{FEDERATION}/site/{'a' * 64}"],
        [f"fedge://{FEDERATION}/owner/a"],
        [f"fedge://{FEDERATION}/coordinator/a"],
        [f"fedge://{FEDERATION.upper()}/site/a"],
        [f"fedge://{FEDERATION[1:]}/site/a"],
        [f" fedge://{FEDERATION}/site/a"],
    ],
)
def test_a_certificate_without_exactly_one_well_formed_uri_names_nobody(uris: list[str]) -> None:
    with pytest.raises(IdentityError, match="exactly one fedge:// URI"):
        principal_of(certificate(*uris))


def test_what_is_not_one_certificate_is_refused() -> None:
    one = pem(certificate(principal_uri(FEDERATION, "site", "a")))
    with pytest.raises(IdentityError, match="exactly one certificate, found 2"):
        load_certificate(one + one)
    with pytest.raises(IdentityError, match="at most"):
        load_certificate(one + b"#" * MAX_CERTIFICATE_BYTES)
    for garbage in (b"", b"garbage", one[:-40], one.replace(b"MII", b"AAA"), "\ud800"):
        with pytest.raises(IdentityError, match="PEM"):
            load_certificate(garbage)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_anywhere_gives_a_principal_or_an_identity_error(place: int, value: int) -> None:
    der = bytearray(DER)
    der[place % len(der)] = value
    text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"
    with contextlib.suppress(IdentityError):
        principal_of(text)


DER = certificate(f"fedge://{FEDERATION}/site/icu-1").public_bytes(serialization.Encoding.DER)


def test_a_certificate_counts_from_five_minutes_before_its_start_to_its_very_end() -> None:
    principal = principal_of(certificate(principal_uri(FEDERATION, "site", "a")))
    second = timedelta(seconds=1)
    for now in (NOW - timedelta(minutes=5), NOW, principal.not_after):
        principal.check(now=now)
    with pytest.raises(IdentityError, match=r"valid from 2025-06-01 12:00:00Z.*clock"):
        principal.check(now=NOW - timedelta(minutes=5) - second)
    with pytest.raises(IdentityError, match=r"expired at 2025-06-02 12:00:00Z: enrol again"):
        principal.check(now=principal.not_after + second)


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "a" * 63])
def test_a_good_name_is_returned(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", ".a", "a/b", "a b", "ä", "a\n", "a" * 64, "a\0"])
def test_a_bad_name_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigError, match="site name"):
        check_name(name)
    with pytest.raises(ConfigError):
        principal_uri(FEDERATION, "site", name)


def test_a_token_survives_its_text() -> None:
    made = token()
    text = made.encode()
    assert re.fullmatch(r"fedge1\.[A-Za-z0-9_-]{400,1000}", text)
    assert Token.decode(f"  {text}\n") == made
    assert made.site == "icu-1"
    assert key_of_pem(made.key_pem).private_numbers() == KEY.private_numbers()
    assert load_certificate(made.certificate_pem).public_key() == KEY.public_key()


def test_a_token_never_shows_its_key() -> None:
    shown = repr(token())
    assert "icu-1" in shown
    assert "PRIVATE" not in shown
    assert "key_pem" not in shown


@settings(max_examples=300, deadline=None)
@given(place=st.integers(7, 10_000), value=st.characters(codec="ascii"))
def test_a_token_with_one_other_character_is_refused(place: int, value: str) -> None:
    text = TOKEN
    place = 7 + (place - 7) % (len(text) - 7)
    changed = text[:place] + value + text[place + 1 :]
    if changed.strip() == text:
        return
    with pytest.raises(IdentityError, match="damaged"):
        Token.decode(changed)


TOKEN = token().encode()


def test_a_token_has_one_spelling() -> None:
    texts = [token("x" * length).encode() for length in range(1, 40)]
    text = next(text for text in texts if (len(text) - len("fedge1.")) % 4)  # has spare bits at its end
    data = base64.urlsafe_b64decode(text[7:] + "==")
    others = [text[:-1] + last for last in string.ascii_letters + string.digits + "-_" if last != text[-1]]
    same = [other for other in others if base64.urlsafe_b64decode(other[7:] + "==") == data]
    assert same
    for other in same:
        with pytest.raises(IdentityError, match="damaged"):
            Token.decode(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with"),
        (TOKEN[1:], "starts with"),
        ("fedge2." + TOKEN[7:], "starts with"),
        ("fedge1.", "damaged"),
        ("fedge1.AAAA", "damaged"),
        ("fedge1.A", "damaged"),
        (TOKEN[:-1], "damaged"),
        (TOKEN + "A", "damaged"),
        (TOKEN + "=", "damaged"),
        (TOKEN[:100] + " " + TOKEN[100:], "damaged"),
        (TOKEN.replace("fedge1.", "fedge1.+"), "damaged"),
        (TOKEN + "ä", "damaged"),
        (TOKEN + "A" * 2048, "at most 2048 characters"),
    ],
)
def test_text_that_is_not_a_token_is_refused(text: str, message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        Token.decode(text)


def rewritten(body: bytes) -> str:
    """A token text whose checksum is right, as an attacker would write it."""
    data = hashlib.sha256(b"fedge1." + body).digest()[:8] + body
    return "fedge1." + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_parts_of_a_token_that_do_not_belong_together_are_refused_in_spite_of_the_checksum() -> None:
    body = base64.urlsafe_b64decode(TOKEN[7:] + "=" * (-len(TOKEN[7:]) % 4))[8:]
    assert rewritten(body) == TOKEN
    fingerprint_, scalar, der = body[:32], body[32:64], body[64:]
    other = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value.to_bytes(32, "big")
    site = certificate(principal_uri(FEDERATION, "site", "icu-1")).public_bytes(serialization.Encoding.DER)
    for bad, message in (
        (fingerprint_ + other + der, "match"),
        (fingerprint_ + scalar + site, "for enrolment"),
        (fingerprint_ + bytes(32) + der, "damaged"),
        (fingerprint_ + b"\xff" * 32 + der, "damaged"),
        (fingerprint_ + scalar + der + b"\0", "damaged"),
        (fingerprint_ + scalar, "damaged"),
        (fingerprint_[:5], "damaged"),
    ):
        with pytest.raises(IdentityError, match=message):
            Token.decode(rewritten(bad))


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=600))
def test_any_bytes_with_a_right_checksum_are_a_typed_refusal(body: bytes) -> None:
    with pytest.raises(FedgeError):
        Token.decode(rewritten(body))


def test_only_an_unencrypted_p256_key_is_a_key() -> None:
    assert key_of_pem(key_to_pem(KEY)).private_numbers() == KEY.private_numbers()
    encoding, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    encrypted = KEY.private_bytes(encoding, pkcs8, serialization.BestAvailableEncryption(b"secret"))
    for bad in (b"", b"garbage", encrypted, key_to_pem(ec.generate_private_key(ec.SECP384R1()))):
        with pytest.raises(IdentityError, match="private key"):
            key_of_pem(bad)


def test_a_fingerprint_is_the_sha256_of_the_der_form() -> None:
    found = certificate(principal_uri(FEDERATION, "site", "a"))
    der = found.public_bytes(serialization.Encoding.DER)
    assert fingerprint(pem(found)) == fingerprint(found) == hashlib.sha256(der).digest()
