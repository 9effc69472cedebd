"""The directory of the sites' keys: what each change makes of it, on both databases, and that it never goes back."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa
from authorities import application, enrol
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from databases import database_url, postgresql

from fedge.errors import IdentityError, RemoteProtocolError, RunError, StorageError
from fedge.principal import Principal, Token, principal_of
from fedge.secagg.directory import Directory, Statement
from fedge.signing import public_bytes
from fedge_server.identity import Authority
from fedge_server.store import directories, schema
from fedge_server.store.database import Database
from fedge_server.store.registry import Registry
from fedge_server.store.store import Store

__all__ = ["database_url", "postgresql"]  # fixtures that the tests here ask for

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
REQUEST = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(x509.Name([]))
    .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    .public_bytes(serialization.Encoding.DER)
)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def authority(tmp_path: Path, database: Database) -> Authority:
    return Authority.create(tmp_path / "server", Registry(database), now=NOW, hosts=[])[0]


def token(authority: Authority, site: str = "icu-1", *, now: datetime = NOW) -> Principal:
    return Token.decode(authority.issue_token(site, now=now)).principal


def enrolled(
    authority: Authority,
    site: str = "icu-1",
    *,
    now: datetime = NOW,
    key: Ed25519PrivateKey | None = None,
) -> Principal:
    return principal_of(enrol(authority, token(authority, site, now=now), REQUEST, now=now, key=key))


def newest(authority: Authority) -> Directory:
    """The newest directory, as everybody else checks it."""
    signed = authority.directories.newest()
    return signed.directory.check(
        signed.signature,
        authority.issuer.key.public_key(),
        federation=authority.federation,
        now_s=NOW.timestamp(),
    )


def said_of(certificate: Principal, key: Ed25519PrivateKey) -> Statement:
    start, end = int(certificate.not_before.timestamp()), int(certificate.not_after.timestamp())
    return Statement(certificate.name, public_bytes(key), start, end)


# What changes make of it.


def test_a_site_that_enrols_is_on_the_directory_for_as_long_as_its_certificate_is_valid(
    authority: Authority,
) -> None:
    with pytest.raises(RunError, match="not signed yet: its operator has to start the coordinator again"):
        authority.directories.newest()
    key = Ed25519PrivateKey.generate()
    certificate = enrolled(authority, key=key)
    assert newest(authority).statements == (said_of(certificate, key),)
    assert newest(authority).key("icu-1") == public_bytes(key)


def test_each_change_to_who_is_active_is_a_directory_of_a_higher_epoch(authority: Authority) -> None:
    one, two, three = (Ed25519PrivateKey.generate() for _ in range(3))
    first = enrolled(authority, key=one)
    second = enrolled(authority, "icu-2", key=two)
    epochs = [newest(authority).epoch]
    renewed = principal_of(authority.renew(first, REQUEST, now=NOW + timedelta(minutes=1)))
    assert newest(authority).statements == (said_of(renewed, one), said_of(second, two))
    epochs.append(newest(authority).epoch)
    again = enrolled(authority, key=three, now=NOW + timedelta(minutes=2))
    assert newest(authority).statements == (said_of(again, three), said_of(second, two))
    epochs.append(newest(authority).epoch)
    authority.revoke("icu-2", now=NOW)
    assert newest(authority).statements == (said_of(again, three),)
    epochs.append(newest(authority).epoch)
    back = enrolled(authority, "icu-2", key=two)
    assert newest(authority).statements == (said_of(again, three), said_of(back, two))
    epochs.append(newest(authority).epoch)
    assert epochs == sorted(set(epochs)), "also where the clock went back"
    assert not authority.directories.changes(now=NOW).any


def test_what_changes_nobodys_key_signs_nothing(authority: Authority) -> None:
    site = enrolled(authority)
    before = authority.directories.newest()
    authority.issue_admin("ops", now=NOW)
    authority.revoke("ops", kind="admin", now=NOW)
    authority.issue_token("icu-2", now=NOW)
    authority.revoke("icu-2", now=NOW)
    with pytest.raises(RemoteProtocolError):
        authority.renew(site, b"", now=NOW)
    authority.directories.settle(now=NOW + DAY)
    assert authority.directories.newest() == before


def test_epochs_follow_the_clock_so_that_a_restored_database_does_not_repeat_them(
    authority: Authority, database: Database
) -> None:
    enrolled(authority)
    lost = newest(authority).epoch
    with database.writing() as connection:  # as it was before the first one
        connection.execute(sa.delete(schema.directories))
    authority.directories.settle(now=NOW + DAY)
    assert newest(authority).epoch > lost + 1000


# The same transaction.


def test_a_failure_while_it_is_signed_enrols_nobody_and_leaves_it_as_it_was(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = enrolled(authority)
    before, wish = authority.directories.newest(), token(authority, "icu-2")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(directories, "add_event", full)
        for change in (
            lambda: enrol(authority, wish, REQUEST, now=NOW),
            lambda: authority.renew(site, REQUEST, now=NOW + DAY),
            lambda: authority.revoke("icu-1", now=NOW),
        ):
            with pytest.raises(StorageError, match="No space left"):
                change()
    assert authority.directories.newest() == before
    assert [holder.name for holder in authority.sites()] == ["icu-1"]
    authority.check(site, now=NOW)
    enrol(authority, wish, REQUEST, now=NOW)
    assert newest(authority).key("icu-2") is not None


def test_what_was_not_signed_is_made_good_when_the_coordinator_starts(
    authority: Authority, database: Database
) -> None:
    key = Ed25519PrivateKey.generate()
    enrolled(authority, key=key)
    before = newest(authority)
    with database.writing() as connection:
        connection.execute(
            sa.update(schema.holders).where(schema.holders.c.kind == "site").values(revoked=True)
        )
    assert authority.directories.changes(now=NOW).removed == ("icu-1",)
    authority.directories.settle(now=NOW)
    assert newest(authority).statements == ()
    assert newest(authority).epoch > before.epoch


def test_enrolments_at_once_are_all_on_it_and_no_epoch_is_given_twice(
    authority: Authority, database: Database, database_url: str
) -> None:
    tokens = [token(authority, f"icu-{number}") for number in range(24)]
    gate = Barrier(6)

    def enrol_some(part: list[Principal]) -> None:
        beside = Database(database_url)
        beside.join()
        try:
            own = Authority.load(authority.folder, Registry(beside))
            gate.wait()
            for each in part:
                enrol(own, each, REQUEST, now=NOW)
        finally:
            beside.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enrol_some, [tokens[start::6] for start in range(6)]))
    assert [each.site for each in newest(authority).statements] == sorted(each.name for each in tokens)
    signed = [event for event in Store(database).events() if event.kind == "directory_signed"]
    assert len({event.subject for event in signed}) == len(signed) == len(tokens)
    assert int(signed[0].subject.split()[1]) == newest(authority).epoch


def test_auditors_are_told_what_was_signed(authority: Authority, database: Database) -> None:
    enrolled(authority)
    event = next(event for event in Store(database).events() if event.kind == "directory_signed")
    directory = newest(authority)
    assert event.subject == f"epoch {directory.epoch}"
    assert event.detail == f"1 sites, SHA-256 {directory.digest.hex()}"


# Keys that are not a site's own.


def test_a_request_without_a_proven_key_is_refused_and_leaves_the_token_unspent(authority: Authority) -> None:
    wish, other = token(authority), token(authority, "icu-2")
    good, foreign = application(wish, REQUEST), application(other, REQUEST)
    for bad in (
        {"key": b"", "proof": b""},
        {"key": good["key"], "proof": b""},
        {"key": good["key"], "proof": foreign["proof"]},
        {"key": good["key"], "proof": bytes(64)},
        foreign,
        application(wish, b"another request"),
    ):
        with pytest.raises(RemoteProtocolError, match="identity key: expected"):
            authority.enrol(wish, REQUEST, **bad, now=NOW)
    assert authority.sites() == ()
    authority.enrol(wish, REQUEST, **good, now=NOW)


def test_two_sites_never_have_the_same_key_even_if_one_is_revoked(authority: Authority) -> None:
    key = Ed25519PrivateKey.generate()
    enrolled(authority, key=key)
    wish = token(authority, "icu-2")
    for _ in range(2):
        with pytest.raises(IdentityError, match="one that is another site's already"):
            enrol(authority, wish, REQUEST, now=NOW, key=key)
        authority.revoke("icu-1", now=NOW)
    assert newest(authority).statements == ()
    enrol(authority, wish, REQUEST, now=NOW)
    enrolled(authority, key=key)  # whose it was may have it again
    assert newest(authority).key("icu-1") == public_bytes(key)


def test_a_renewal_may_say_the_key_that_is_known_and_no_other(authority: Authority) -> None:
    key = Ed25519PrivateKey.generate()
    site = enrolled(authority, key=key)
    authority.renew(site, REQUEST, **application(site, REQUEST, key), now=NOW + timedelta(minutes=1))
    before = authority.directories.newest()
    with pytest.raises(IdentityError, match="expected the one that it enrolled with, found another"):
        authority.renew(site, REQUEST, **application(site, REQUEST), now=NOW + DAY)
    with pytest.raises(RemoteProtocolError, match="proof"):
        authority.renew(site, REQUEST, key=public_bytes(key), proof=bytes(64), now=NOW + DAY)
    assert authority.directories.newest() == before
    assert newest(authority).key("icu-1") == public_bytes(key)


def test_a_site_from_before_there_were_keys_can_renew_and_is_not_on_it(
    authority: Authority, database: Database
) -> None:
    site = enrolled(authority)
    with database.writing() as connection:
        connection.execute(sa.delete(schema.identity_keys))
        connection.execute(sa.delete(schema.directories))
    authority.renew(site, REQUEST, now=NOW)
    assert newest(authority).statements == ()
    with pytest.raises(IdentityError, match="enrol again"):
        authority.renew(site, REQUEST, **application(site, REQUEST), now=NOW)
