"""The site's identity against a real authority: request, reply, files, and everything it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from authorities import application, new_authority
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedge import files
from fedge.errors import ConfigError, IdentityError
from fedge.principal import Token, key_of_pem, key_to_pem
from fedge.signing import authority_to_pem, make_signing_key, public_bytes, signing_key_of_pem
from fedge_client import identity as client_identity
from fedge_client.identity import (
    Identity,
    accept_certificate,
    accept_renewal,
    load_identity,
    make_csr,
    open_token,
    save_identity,
)
from fedge_server.identity import Authority

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "server", hosts=[], now=NOW)[0]


@pytest.fixture
def foreign(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "foreign", hosts=[], now=NOW)[0]


def enrol(authority: Authority, site: str = "icu-1", *, now: datetime = NOW) -> Identity:
    token = open_token(authority.issue_token(site, now=now), ca_pem=authority.ca_pem, now=now)
    key_pem, csr = make_csr()
    signing_pem = make_signing_key()
    proven = application(token.principal, csr, signing_key_of_pem(signing_pem))
    reply = authority.enrol(token.principal, csr, **proven, now=now)
    return accept_certificate(
        reply,
        key_pem=key_pem,
        signing_pem=signing_pem,
        ca_pem=authority.ca_pem,
        site=token.site,
        now=now,
    )


# The token.


def test_a_token_opens_with_the_ca_file_of_its_coordinator(authority: Authority) -> None:
    text = authority.issue_token("icu-1", now=NOW)
    token = open_token(f"{text}\n", ca_pem=authority.ca_pem, now=NOW)
    assert token == Token.decode(text)
    assert (token.site, token.principal.federation) == ("icu-1", authority.federation)


def test_a_token_and_a_ca_file_of_two_coordinators_are_told_apart(
    authority: Authority, foreign: Authority
) -> None:
    text = authority.issue_token("icu-1", now=NOW)
    with pytest.raises(IdentityError, match=r"of different coordinators.*take ca\.pem from the coordinator"):
        open_token(text, ca_pem=foreign.ca_pem, now=NOW)
    with pytest.raises(IdentityError, match="CA file: expected a certificate in PEM form"):
        open_token(text, ca_pem=b"not a certificate", now=NOW)
    with pytest.raises(IdentityError, match="exactly one certificate, found 2"):
        open_token(text, ca_pem=authority.ca_pem + foreign.ca_pem, now=NOW)


def test_a_token_with_another_coordinators_certificate_inside_is_refused(
    authority: Authority, foreign: Authority
) -> None:
    inside = Token.decode(foreign.issue_token("icu-1", now=NOW))
    ours = Token.decode(authority.issue_token("icu-1", now=NOW)).ca_fingerprint
    mixed = Token(ours, inside.principal, inside.certificate_pem, inside.key_pem).encode()
    with pytest.raises(IdentityError, match="signed by the coordinator's CA"):
        open_token(mixed, ca_pem=authority.ca_pem, now=NOW)


def test_an_expired_or_damaged_token_is_refused_before_any_connection(authority: Authority) -> None:
    text = authority.issue_token("icu-1", now=NOW)
    with pytest.raises(IdentityError, match=r"token for site 'icu-1' expired.*fedge server token"):
        open_token(text, ca_pem=authority.ca_pem, now=NOW + 2 * DAY)
    with pytest.raises(IdentityError, match="damaged"):
        open_token(text[:-4], ca_pem=authority.ca_pem, now=NOW)


# The request and the reply.


def test_a_request_carries_a_new_p256_key_and_names_nobody() -> None:
    (one_pem, one), (two_pem, two) = make_csr(), make_csr()
    assert one_pem != two_pem
    for key_pem, der in ((one_pem, one), (two_pem, two)):
        request = x509.load_der_x509_csr(der)
        assert request.is_signature_valid
        assert request.public_key() == key_of_pem(key_pem).public_key()
        assert request.subject == x509.Name([])
        assert not list(request.extensions)


def test_a_renewal_keeps_the_key(authority: Authority) -> None:
    old = enrol(authority)
    _, csr = make_csr(old.key_pem)
    reply = authority.renew(old.principal, csr, now=NOW + DAY)
    new = accept_renewal(old, reply, now=NOW + DAY)
    assert (new.key_pem, new.signing_pem) == (old.key_pem, old.signing_pem)
    assert new.principal.not_after == old.principal.not_after + DAY
    with pytest.raises(IdentityError, match="P-256"):
        make_csr(key_to_pem(ec.generate_private_key(ec.SECP384R1())))


def test_an_accepted_reply_is_who_the_token_promised(authority: Authority) -> None:
    identity = enrol(authority)
    assert (identity.site, identity.federation) == ("icu-1", authority.federation)
    assert identity.principal.role == "site"
    authority.check(identity.principal, now=NOW)


def test_an_identity_never_shows_its_key(authority: Authority) -> None:
    shown = repr(enrol(authority))
    assert "icu-1" in shown
    for secret in ("PRIVATE", "key_pem", "signing", "BEGIN"):
        assert secret not in shown


def test_a_reply_that_is_not_this_sites_certificate_is_refused(
    authority: Authority, foreign: Authority
) -> None:
    mine, other, stranger = enrol(authority), enrol(authority, "icu-2"), enrol(foreign)
    admin = authority.issue_admin("ops", now=NOW)

    def reply(pem: bytes, key_pem: bytes, now: datetime = NOW) -> None:
        accept_certificate(
            pem,
            key_pem=key_pem,
            signing_pem=mine.signing_pem,
            ca_pem=authority.ca_pem,
            site="icu-1",
            now=now,
        )

    reply(mine.certificate_pem, mine.key_pem)
    for pem, key_pem, message in (
        (mine.certificate_pem, other.key_pem, "for another key"),
        (other.certificate_pem, other.key_pem, "for site 'icu-1', found one for 'icu-2'"),
        (stranger.certificate_pem, stranger.key_pem, "signed by the coordinator's CA"),
        (admin.certificate_pem, admin.key_pem, "expected a site's certificate"),
        (b"", mine.key_pem, "PEM"),
        (mine.certificate_pem * 2, mine.key_pem, "exactly one"),
        (b"#" * 20_000, mine.key_pem, "at most"),
        (mine.certificate_pem, b"", "private key"),
    ):
        with pytest.raises(IdentityError, match=message):
            reply(pem, key_pem)
    with pytest.raises(IdentityError, match="expired"):
        reply(mine.certificate_pem, mine.key_pem, now=NOW + 91 * DAY)


# The files.


@pytest.fixture
def folder(authority: Authority, tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "site"
    save_identity(path, enrol(authority))
    return path


def test_an_identity_survives_its_files_and_they_are_private(authority: Authority, folder: Path) -> None:
    identity = enrol(authority)
    save_identity(folder, identity)
    assert load_identity(folder, now=NOW) == identity
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca.pem",
        "client.key",
        "client.pem",
        "signing.key",
    ]
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["client.key", "signing.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o601, 0o644, 0o777])
def test_a_key_that_others_can_touch_is_refused(folder: Path, name: str, mode: int) -> None:
    (folder / name).chmod(mode)
    with pytest.raises(IdentityError, match=rf"found {mode:o}: run chmod 600 .*{name}"):
        load_identity(folder, now=NOW)
    (folder / name).chmod(0o400)
    load_identity(folder, now=NOW)


def test_an_expired_certificate_says_how_to_enrol_again(folder: Path) -> None:
    load_identity(folder, now=NOW + 90 * DAY)
    with pytest.raises(IdentityError, match=r"icu-1 expired at .*enrol again .*fedge client enrol"):
        load_identity(folder, now=NOW + 90 * DAY + timedelta(seconds=1))
    with pytest.raises(IdentityError, match="clock"):
        load_identity(folder, now=NOW - DAY)


@pytest.mark.parametrize("name", ["client.key", "signing.key", "client.pem", "ca.pem"])
def test_a_missing_or_damaged_file_is_an_identity_error_that_names_the_folder(
    folder: Path, name: str
) -> None:
    for damage in (b"", b"garbage", b"#" * 20_000):
        (folder / name).write_bytes(damage)
        with pytest.raises(IdentityError, match=str(folder)):
            load_identity(folder, now=NOW)
    (folder / name).unlink()
    with pytest.raises(IdentityError, match=rf"{name}.*fedge client enrol"):
        load_identity(folder, now=NOW)
    (folder / name).mkdir(mode=0o700)
    with pytest.raises(IdentityError, match=str(folder)):
        load_identity(folder, now=NOW)


def test_files_of_two_identities_do_not_mix(authority: Authority, foreign: Authority, folder: Path) -> None:
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    second = enrol(authority)
    for name, data, message in (
        ("client.key", second.key_pem, "another key"),
        ("client.pem", second.certificate_pem, "another key"),
        ("ca.pem", foreign.ca_pem, "CA"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(IdentityError, match=message):
            load_identity(folder, now=NOW)
        (folder / name).write_bytes(good[name])
    load_identity(folder, now=NOW)


def test_an_identity_signs_with_its_own_key_and_trusts_the_ca_unless_told_otherwise(
    authority: Authority, folder: Path
) -> None:
    identity = enrol(authority)
    signature = identity.signing.sign(b"message")
    signing_key_of_pem(identity.signing_pem).public_key().verify(signature, b"message")
    assert public_bytes(identity.signing) != public_bytes(enrol(authority).signing), (
        "each enrolment has its own"
    )
    assert identity.authority == authority.issuer.key.public_key()
    apart = ec.generate_private_key(ec.SECP256R1()).public_key()
    save_identity(folder, replace(identity, authority_pem=authority_to_pem(apart)))
    assert load_identity(folder, now=NOW).authority == apart
    assert (folder / "authority.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [b"", b"garbage"])
def test_a_damaged_authority_is_never_replaced_by_the_ca(folder: Path, damage: bytes) -> None:
    (folder / "authority.pem").write_bytes(damage)
    with pytest.raises(IdentityError, match="authority"):
        load_identity(folder, now=NOW)


def test_an_enrolment_that_is_cut_off_between_its_files_is_found(
    authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a site could sign with a key that its coordinator has never seen, or has superseded."""
    new, write, left = enrol(authority), files.write_private, 0
    for survivors in range(1, 4):
        left = survivors

        def crash(path: Path, data: bytes | str) -> None:
            nonlocal left
            if left == 0:
                raise ConfigError("power cut")
            left -= 1
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(client_identity, "write_private", crash)
            with pytest.raises(ConfigError, match="power cut"):
                save_identity(folder, new)
        with pytest.raises(IdentityError, match=r"for another key.*fedge client enrol"):
            load_identity(folder, now=NOW)


def test_a_crash_at_any_write_of_a_renewal_leaves_a_usable_identity(
    authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = load_identity(folder, now=NOW)
    _, csr = make_csr(old.key_pem)
    reply = authority.renew(old.principal, csr, now=NOW + DAY)
    new = accept_renewal(old, reply, now=NOW + DAY)
    write = files.write_private
    for survivors in range(4):
        left = survivors

        def crash(path: Path, data: bytes | str) -> None:
            nonlocal left
            if left == 0:
                raise ConfigError("power cut")
            left -= 1
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(client_identity, "write_private", crash)
            with pytest.raises(ConfigError, match="power cut"):
                save_identity(folder, new)
        authority.check(load_identity(folder, now=NOW + DAY).principal, now=NOW + DAY)
    save_identity(folder, new)
    assert load_identity(folder, now=NOW + DAY) == new


def test_token_and_identity_open_a_real_connection_to_their_own_coordinator_only(
    authority: Authority, foreign: Authority, folder: Path
) -> None:
    identity = load_identity(folder, now=NOW)
    token = open_token(authority.issue_token("icu-2", now=NOW), ca_pem=authority.ca_pem, now=NOW)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    pairs = [(identity.key_pem, identity.certificate_pem), (token.key_pem, token.certificate_pem)]
    for coordinator, welcome in ((authority, True), (foreign, False)):
        own = coordinator.server_credential(now=NOW)
        with ThreadPoolExecutor(1) as pool:
            server = grpc.server(pool)
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"echo": handler}),))
            # The foreign coordinator would take our certificates: it is the client that must refuse.
            tls = grpc.ssl_server_credentials(
                [(own.key_pem, own.certificate_pem)],
                root_certificates=authority.ca_pem,
                require_client_auth=True,
            )
            port = server.add_secure_port("127.0.0.1:0", tls)
            server.start()
            try:
                for key_pem, certificate_pem in pairs:
                    client = grpc.ssl_channel_credentials(identity.ca_pem, key_pem, certificate_pem)
                    with grpc.secure_channel(f"localhost:{port}", client) as channel:
                        if welcome:
                            assert (
                                channel.unary_unary("/t/echo", bytes, bytes)(b"hello", timeout=20) == b"hello"
                            )
                            continue
                        with pytest.raises(grpc.RpcError) as caught:
                            channel.unary_unary("/t/echo", bytes, bytes)(b"hello", timeout=20)
                        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            finally:
                server.stop(None).wait()
