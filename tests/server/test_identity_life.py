"""After enrolment: a token under concurrency, renewal, superseding and revocation."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest
from authorities import enrol, is_refused, load_authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import ConfigError, IdentityError, StorageError
from fedge.principal import Principal, Token, principal_of
from fedge_server.identity import Authority
from fedge_server.store.database import Database
from fedge_server.store.registry import Registry
from fedge_server.store.store import Store

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'fedge.db'}")
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def authority(tmp_path: Path, database: Database) -> Authority:
    return Authority.create(tmp_path, Registry(database), hosts=[], now=NOW)[0]


def csr(key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def bootstrap(authority: Authority, site: str = "icu-1") -> Principal:
    return Token.decode(authority.issue_token(site, now=NOW)).principal


def enrolled(authority: Authority, site: str = "icu-1") -> Principal:
    return principal_of(enrol(authority, bootstrap(authority, site), csr(), now=NOW))


def test_of_many_threads_with_one_token_exactly_one_wins(authority: Authority) -> None:
    def attempt(token: Principal) -> bool:
        gate.wait()
        try:
            return bool(enrol(load_authority(authority.folder), token, csr(), now=NOW))
        except IdentityError as error:
            if "already used" in str(error):
                return False
            raise

    gate = Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for turn in range(10):
            token = bootstrap(authority, f"icu-{turn}")
            assert sum(pool.map(attempt, [token] * 8)) == 1


def test_renewals_at_once_are_all_remembered(authority: Authority) -> None:
    def renew(site: Principal) -> Principal:
        gate.wait()
        return principal_of(load_authority(authority.folder).renew(site, csr(), now=NOW))

    gate = Barrier(8)
    site = enrolled(authority)
    with ThreadPoolExecutor(8) as pool:
        for principal in [site, *pool.map(renew, [site] * 8)]:
            authority.check(principal, now=NOW)


RACER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from fedge.errors import IdentityError
from fedge.principal import Token
from authorities import enrol, load_authority
authority = load_authority(Path(sys.argv[1]))
request = Path(sys.argv[2]).read_bytes()
tokens = [Token.decode(line).principal for line in Path(sys.argv[3]).read_text().splitlines()]
print("ready", flush=True)
sys.stdin.readline()
for token in tokens:
    try:
        enrol(authority, token, request, now=datetime.now(UTC))
        print("won", flush=True)
    except IdentityError as error:
        assert "already used" in str(error), error
        print("lost", flush=True)
"""


def test_of_two_processes_with_one_token_exactly_one_wins(authority: Authority, tmp_path: Path) -> None:
    tokens = [authority.issue_token(f"icu-{turn}", now=NOW) for turn in range(30)]
    (tmp_path / "tokens").write_text("\n".join(tokens))
    (tmp_path / "csr").write_bytes(csr())
    command = [
        sys.executable,
        "-c",
        RACER,
        *map(str, (authority.folder, tmp_path / "csr", tmp_path / "tokens")),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    for pair in zip(*results, strict=True):
        assert sorted(pair) == ["lost", "won"]
    assert len(authority.sites()) == len(tokens) == len(results[0])


# Renewal, superseding, revocation.


def test_a_renewal_leaves_the_old_certificate_usable_until_it_expires(authority: Authority) -> None:
    old = enrolled(authority)
    later = NOW + 60 * DAY
    new = principal_of(authority.renew(old, csr(), now=later))
    assert (new.uri, new.not_after) == (old.uri, later + 90 * DAY)
    for principal in (old, new):
        authority.check(principal, now=later)
    after = old.not_after + timedelta(seconds=1)
    authority.check(new, now=after)
    with pytest.raises(IdentityError, match="expired"):
        authority.check(old, now=after)
    with pytest.raises(IdentityError, match="expired"):
        authority.renew(old, csr(), now=after)
    authority.renew(new, csr(), now=after)
    (site,) = authority.sites()
    assert f"{old.serial:040x}" not in site.serials
    assert len(site.serials) == 2


def test_a_client_that_renews_in_a_loop_fills_nothing_and_keeps_its_certificate(authority: Authority) -> None:
    site = enrolled(authority)
    for _ in range(20):
        last = principal_of(authority.renew(site, csr(), now=NOW))
    (record,) = authority.sites()
    assert len(record.serials) == 16
    authority.check(site, now=NOW)
    authority.check(last, now=NOW)


def test_enrolling_again_supersedes_every_earlier_certificate(authority: Authority) -> None:
    first = enrolled(authority)
    renewed = principal_of(authority.renew(first, csr(), now=NOW))
    second = enrolled(authority)
    for stale in (first, renewed):
        assert is_refused(authority, stale, now=NOW)
        with pytest.raises(IdentityError, match="superseded"):
            authority.check(stale, now=NOW)
        with pytest.raises(IdentityError, match="superseded"):
            authority.renew(stale, csr(), now=NOW)
    authority.check(second, now=NOW)


def test_a_renewal_that_a_new_enrolment_overtakes_is_refused(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = enrolled(authority)
    with monkeypatch.context() as patch:  # The check passes, then another process enrols the site anew.
        patch.setattr(Authority, "check", lambda self, principal, *, now: None)
        new = enrolled(authority)
        with pytest.raises(IdentityError, match="cannot be renewed"):
            authority.renew(old, csr(), now=NOW)
    (site,) = authority.sites()
    assert list(site.serials) == [f"{new.serial:040x}"]


def test_a_revoked_site_is_refused_at_once_by_every_process(authority: Authority) -> None:
    running = load_authority(authority.folder)
    site, other = enrolled(authority), enrolled(authority, "icu-2")
    running.check(site, now=NOW)
    authority.revoke("icu-1", now=NOW)
    assert is_refused(running, site, now=NOW)
    assert not is_refused(running, other, now=NOW)
    with pytest.raises(IdentityError, match="site 'icu-1' is revoked"):
        running.check(site, now=NOW)
    with pytest.raises(IdentityError, match="revoked"):
        running.renew(site, csr(), now=NOW)
    assert [record.revoked for record in running.sites()] == [True, False]


def test_only_a_token_issued_after_the_revocation_lets_a_site_in_again(authority: Authority) -> None:
    site, before = enrolled(authority), bootstrap(authority)
    authority.revoke("icu-1", now=NOW)
    with pytest.raises(IdentityError, match="cancelled"):
        enrol(authority, before, csr(), now=NOW)
    assert is_refused(authority, site, now=NOW)
    again = enrolled(authority)
    authority.check(again, now=NOW)
    assert is_refused(authority, site, now=NOW)


def test_revoking_reaches_a_site_that_has_only_a_token_and_no_stranger(authority: Authority) -> None:
    token = bootstrap(authority, "icu-2")
    authority.revoke("icu-2", now=NOW)
    assert is_refused(authority, token, now=NOW)
    enrolled(authority)
    with pytest.raises(ConfigError, match="did you mean 'icu-1'"):
        authority.revoke("icu-11", now=NOW)
    with pytest.raises(ConfigError, match="site name"):
        authority.revoke("../admins/admin", now=NOW)


def test_an_admin_can_be_revoked_and_replaced(authority: Authority) -> None:
    first = authority.issue_admin("ops", now=NOW).principal
    second = authority.issue_admin("ops", now=NOW).principal
    with pytest.raises(IdentityError, match="superseded"):
        authority.check(first, now=NOW)
    authority.check(second, now=NOW)
    authority.revoke("ops", now=NOW, kind="admin")
    with pytest.raises(IdentityError, match="admin 'ops' is revoked"):
        authority.check(second, now=NOW)
    with pytest.raises(ConfigError, match="admin name"):
        authority.issue_admin("no/name", now=NOW)


def test_a_certificate_that_the_ca_signed_but_nobody_recorded_is_refused(authority: Authority) -> None:
    site = enrolled(authority)
    with closing(sqlite3.connect(authority.folder / "fedge.db")) as records, records:
        records.execute("DELETE FROM holders")
    with pytest.raises(IdentityError, match="not enrolled here"):
        authority.check(site, now=NOW)


def test_records_that_cannot_be_read_let_nobody_in(authority: Authority) -> None:
    site = enrolled(authority)
    with closing(sqlite3.connect(authority.folder / "fedge.db")) as records, records:
        records.execute("ALTER TABLE holders RENAME TO elsewhere")
    beside = load_authority(authority.folder)
    with pytest.raises(StorageError, match="no such table: holders"):
        beside.check(site, now=NOW)


def test_auditors_find_who_was_let_in_and_put_out(authority: Authority, database: Database) -> None:
    enrolled(authority)
    epoch = authority.directories.newest().directory.epoch
    authority.revoke("icu-1", now=NOW, actor="ops")
    found = [(event.kind, event.subject, event.actor) for event in Store(database).events()]
    assert found == [
        ("directory_signed", f"epoch {epoch + 1}", ""),
        ("site_revoked", "icu-1", "ops"),
        ("directory_signed", f"epoch {epoch}", ""),
        ("site_enrolled", "icu-1", ""),
        ("token_issued", "icu-1", ""),
        ("admin_issued", "admin", ""),
    ]
