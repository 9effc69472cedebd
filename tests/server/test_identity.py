"""The authority: what it makes and keeps, what it signs, and whom it enrols."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from authorities import enrol, is_refused, load_authority, new_authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.errors import ConfigError, IdentityError, LimitError, RemoteProtocolError, StorageError
from fedge.principal import Principal, Token, load_certificate, principal_of
from fedge_server.identity import DAY_S, Authority
from fedge_server.store.registry import Registry

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
EMPTY = x509.Name([])
E = TypeVar("E", bound=x509.ExtensionType)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "server", hosts=["fed.example.org", "192.0.2.7"], now=NOW)[0]


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(EMPTY).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def bootstrap(authority: Authority, site: str = "icu-1", *, now: datetime = NOW) -> Principal:
    return Token.decode(authority.issue_token(site, now=now)).principal


def enrolled(authority: Authority, site: str = "icu-1", *, now: datetime = NOW) -> Principal:
    return principal_of(enrol(authority, bootstrap(authority, site, now=now), csr(), now=now))


def extension(certificate: x509.Certificate, kind: type[E]) -> E:
    return certificate.extensions.get_extension_for_class(kind).value


# What it makes and keeps.


def test_a_new_authority_keeps_everything_private_and_loads_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "server"
    authority, admin = new_authority(folder, hosts=[], now=NOW)
    enrolled(authority)
    bootstrap(authority, "icu-2")
    for path in (folder, *folder.rglob("*.pem"), *folder.rglob("*.key")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    loaded = load_authority(folder)
    assert loaded.federation == authority.federation == admin.principal.federation
    assert loaded.ca_pem == authority.ca_pem == (folder / "ca.pem").read_bytes()
    assert (admin.principal.role, admin.principal.name) == ("admin", "admin")
    loaded.check(admin.principal, now=NOW)
    assert loaded.server_credential(now=NOW).principal.role == "coordinator"
    for secret in ("PRIVATE", "key"):
        assert secret not in repr((loaded, admin))


def test_two_authorities_share_nothing(tmp_path: Path) -> None:
    one, two = (new_authority(tmp_path / name, hosts=[], now=NOW)[0] for name in ("one", "two"))
    assert one.federation != two.federation
    with pytest.raises(IdentityError, match=f"expected a certificate of federation {two.federation}"):
        two.check(enrolled(one), now=NOW)


def test_a_ca_is_never_overwritten_but_an_interrupted_start_can_be_repeated(authority: Authority) -> None:
    with pytest.raises(IdentityError, match="holds a CA already"):
        new_authority(authority.folder, hosts=[], now=NOW)
    assert load_authority(authority.folder).ca_pem == authority.ca_pem
    (authority.folder / "ca.key").unlink()
    again = new_authority(authority.folder, hosts=[], now=NOW)[0]
    assert load_authority(authority.folder).federation == again.federation
    again.server_credential(now=NOW)


@pytest.mark.parametrize("name", ["ca.key", "server.key"])
def test_a_key_that_others_can_read_is_refused(authority: Authority, name: str) -> None:
    (authority.folder / name).chmod(0o640)
    with pytest.raises(IdentityError, match=rf"{name}: expected a file only its owner can read, found 640"):
        load_authority(authority.folder).server_credential(now=NOW)


def test_files_of_two_authorities_do_not_mix(authority: Authority, tmp_path: Path) -> None:
    other = new_authority(tmp_path / "other", hosts=[], now=NOW)[0]
    (authority.folder / "server.key").write_bytes((other.folder / "server.key").read_bytes())
    with pytest.raises(IdentityError, match="do not belong together"):
        authority.server_credential(now=NOW)
    (authority.folder / "server.pem").write_bytes((other.folder / "server.pem").read_bytes())
    with pytest.raises(IdentityError, match="do not belong together"):
        authority.server_credential(now=NOW)
    (authority.folder / "ca.key").write_bytes((other.folder / "ca.key").read_bytes())
    with pytest.raises(IdentityError, match="do not match"):
        load_authority(authority.folder)
    for name in ("ca.key", "ca.pem"):
        (authority.folder / name).write_bytes((other.folder / f"server.{name[3:]}").read_bytes())
    with pytest.raises(IdentityError, match="expected a CA that `fedge server init` made"):
        load_authority(authority.folder)


def test_an_expired_server_certificate_is_refused_until_it_is_issued_anew(authority: Authority) -> None:
    later = NOW + 731 * DAY
    with pytest.raises(IdentityError, match="expired"):
        authority.server_credential(now=later)
    authority.issue_server(hosts=["fed.example.org"], now=later)
    assert authority.server_credential(now=later).principal.not_after > later


def test_the_server_certificate_names_its_hosts_and_loopback(authority: Authority) -> None:
    def names(hosts: list[str]) -> tuple[list[str], list[str]]:
        authority.issue_server(hosts=hosts, now=NOW)
        found = extension(
            load_certificate(authority.server_credential(now=NOW).certificate_pem),
            x509.SubjectAlternativeName,
        )
        addresses = [str(address) for address in found.get_values_for_type(x509.IPAddress)]
        return found.get_values_for_type(x509.DNSName), addresses

    local = ["127.0.0.1", "::1"]
    assert names([]) == (["localhost"], local)
    assert names(["fed.example.org", "192.0.2.7", "localhost"]) == (
        ["localhost", "fed.example.org"],
        [*local, "192.0.2.7"],
    )
    assert names(["0.0.0.0", "::"]) == (["localhost"], local)
    for bad in (
        "",
        "a b",
        "fed.example.org:443",
        "http://x",
        "*.example.org",
        "ä.org",
        "a..b",
        "[::1]",
        "x" * 300,
    ):
        with pytest.raises(ConfigError, match="DNS name or an IP address"):
            names([bad])


def test_every_certificate_can_do_exactly_what_its_role_needs(authority: Authority) -> None:
    ca = load_certificate(authority.ca_pem)
    client, server = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    token = Token.decode(authority.issue_token("icu-1", now=NOW))
    leaves = [
        (token.certificate_pem, client, DAY),
        (enrol(authority, token.principal, csr(), now=NOW), client, 90 * DAY),
        (authority.issue_admin("ops", now=NOW).certificate_pem, client, 365 * DAY),
        (authority.server_credential(now=NOW).certificate_pem, server, 730 * DAY),
    ]
    serials = {ca.serial_number}
    for pem, usage, valid in leaves:
        leaf = load_certificate(pem)
        leaf.verify_directly_issued_by(ca)
        assert extension(leaf, x509.BasicConstraints).ca is False
        assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).critical
        assert list(extension(leaf, x509.ExtendedKeyUsage)) == [usage]
        assert extension(leaf, x509.KeyUsage).digital_signature
        assert not extension(leaf, x509.KeyUsage).key_cert_sign
        assert extension(leaf, x509.SubjectKeyIdentifier).digest
        issuer_id = extension(leaf, x509.AuthorityKeyIdentifier).key_identifier
        assert issuer_id == extension(ca, x509.SubjectKeyIdentifier).digest
        assert isinstance(key := leaf.public_key(), ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)
        assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
        assert leaf.not_valid_after_utc == NOW + valid
        assert leaf.serial_number.bit_length() > 120
        serials.add(leaf.serial_number)
    assert len(serials) == 5
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert extension(ca, x509.KeyUsage).key_cert_sign
    assert not extension(ca, x509.KeyUsage).digital_signature
    assert ca.not_valid_after_utc - NOW == 3650 * DAY


def test_no_certificate_outlives_the_ca(authority: Authority) -> None:
    late = NOW + 3640 * DAY
    assert enrolled(authority, now=late).not_after == NOW + 3650 * DAY


# Enrolment.


def test_a_token_gives_its_site_a_certificate_for_its_own_key(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = enrol(authority, bootstrap(authority), csr(key), now=NOW)
    principal = principal_of(pem)
    assert principal.uri == f"fedge://{authority.federation}/site/icu-1"
    assert load_certificate(pem).public_key() == key.public_key()
    authority.check(principal, now=NOW)
    (site,) = authority.sites()
    assert (site.name, site.enrolled_at, site.revoked) == ("icu-1", NOW, False)
    assert site.serials == (f"{principal.serial:040x}",)


def test_what_a_request_asks_for_beside_its_key_is_ignored(authority: Authority) -> None:
    wish = x509.UniformResourceIdentifier(f"fedge://{authority.federation}/admin/root")
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.SubjectAlternativeName([wish]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    der = request.public_bytes(serialization.Encoding.DER)
    certificate = load_certificate(enrol(authority, bootstrap(authority), der, now=NOW))
    assert principal_of(certificate).uri == f"fedge://{authority.federation}/site/icu-1"
    assert certificate.subject.rfc4514_string() == "CN=icu-1"
    assert not extension(certificate, x509.BasicConstraints).ca
    assert list(extension(certificate, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def forged() -> bytes:
    der = bytearray(csr())
    der[-1] ^= 1
    return bytes(der)


@pytest.mark.parametrize(
    ("request_der", "error", "message"),
    [
        (lambda: csr(ec.generate_private_key(ec.SECP384R1())), RemoteProtocolError, "P-256"),
        (lambda: csr(ec.generate_private_key(ec.SECP256K1())), RemoteProtocolError, "P-256"),
        (lambda: csr(rsa.generate_private_key(65537, 2048)), RemoteProtocolError, "P-256"),
        (lambda: csr() + bytes(4096), LimitError, "at most 4096 bytes"),
        (lambda: b"", RemoteProtocolError, "DER"),
        (lambda: b"garbage", RemoteProtocolError, "DER"),
        (lambda: csr()[:-1], RemoteProtocolError, "DER"),
        (lambda: csr() + b"\0", RemoteProtocolError, "DER"),
        (forged, RemoteProtocolError, "signature"),
    ],
    ids=["p384", "secp256k1", "rsa", "oversized", "empty", "garbage", "cut", "longer", "bad signature"],
)
def test_a_bad_request_is_refused_and_leaves_the_token_unspent(
    authority: Authority, request_der: Callable[[], bytes], error: type[Exception], message: str
) -> None:
    token, site = bootstrap(authority), enrolled(authority, "icu-2")
    with pytest.raises(error, match=message):
        enrol(authority, token, request_der(), now=NOW)
    with pytest.raises(error, match=message):
        authority.renew(site, request_der(), now=NOW)
    enrol(authority, token, csr(), now=NOW)


def test_an_oversized_request_is_not_even_parsed(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(der: bytes) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(x509, "load_der_x509_csr", parse)
    with pytest.raises(LimitError):
        enrol(authority, bootstrap(authority), bytes(4097), now=NOW)


def test_a_token_enrols_once_even_after_a_restart(authority: Authority) -> None:
    token = bootstrap(authority)
    enrol(load_authority(authority.folder), token, csr(), now=NOW)
    for again in (authority, load_authority(authority.folder)):
        assert is_refused(again, token, now=NOW)
        with pytest.raises(IdentityError, match="already used"):
            enrol(again, token, csr(), now=NOW)


def test_an_expired_or_unknown_token_says_so(authority: Authority) -> None:
    token = bootstrap(authority)
    with pytest.raises(IdentityError, match="token for site 'icu-1' expired"):
        enrol(authority, token, csr(), now=NOW + DAY + timedelta(seconds=1))
    _forget(authority, "tokens")
    assert is_refused(authority, token, now=NOW)
    with pytest.raises(IdentityError, match="does not know this token"):
        enrol(authority, token, csr(), now=NOW)


def test_a_newer_token_cancels_the_unused_ones_of_its_site_and_no_others(authority: Authority) -> None:
    old, other, new = (bootstrap(authority, site) for site in ("icu", "icu.2", "icu"))
    with pytest.raises(IdentityError, match="cancelled"):
        enrol(authority, old, csr(), now=NOW)
    enrol(authority, other, csr(), now=NOW)
    enrol(authority, new, csr(), now=NOW)


def test_a_token_needs_a_good_name_and_a_sane_time(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="site name"):
        authority.issue_token("../icu", now=NOW)
    for valid_for_s in (0, -1, 30 * DAY_S + 1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="valid_for_s"):
            authority.issue_token("icu-1", now=NOW, valid_for_s=valid_for_s)
    with closing(sqlite3.connect(authority.folder / "fedge.db")) as records:
        assert records.execute("SELECT count(*) FROM tokens").fetchone() == (0,)


def test_each_step_takes_only_its_own_role(authority: Authority) -> None:
    token, site = bootstrap(authority, "icu-2"), enrolled(authority)
    admin = authority.issue_admin("ops", now=NOW).principal
    for wrong in (site, admin):
        with pytest.raises(IdentityError, match="expected an enrolment token"):
            enrol(authority, wrong, csr(), now=NOW)
    for wrong in (token, admin):
        with pytest.raises(IdentityError, match="expected a site's certificate"):
            authority.renew(wrong, csr(), now=NOW)
    with pytest.raises(IdentityError, match="not for callers"):
        authority.check(authority.server_credential(now=NOW).principal, now=NOW)


def test_a_failure_while_a_token_is_spent_leaves_it_unspent_and_enrols_nobody(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = bootstrap(authority)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_add_certificate", full)
        with pytest.raises(StorageError, match="No space left"):
            enrol(authority, token, csr(), now=NOW)
    assert authority.sites() == ()
    enrol(authority, token, csr(), now=NOW)
    assert [site.name for site in authority.sites()] == ["icu-1"]


def _forget(authority: Authority, table: str) -> None:
    with closing(sqlite3.connect(authority.folder / "fedge.db")) as records, records:
        records.execute(f"DELETE FROM {table}")
