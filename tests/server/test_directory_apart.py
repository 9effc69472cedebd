"""The directory's authority apart from the coordinator: what counts is its signature, and the next epoch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from authorities import enrol, load_authority, new_authority
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import ConfigError, IdentityError, RunError
from fedge.principal import Principal, Token, principal_of
from fedge.secagg.directory import Directory, Statement
from fedge.signing import SignedDirectory
from fedge_client.identity import make_csr
from fedge_server.directories import Changes
from fedge_server.directory_file import read_signed, read_unsigned, write_directory
from fedge_server.identity import Authority
from fedge_server.membership import Membership

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
KEY = ec.generate_private_key(ec.SECP256R1())
REQUEST = make_csr()[1]


@pytest.fixture
def alone(tmp_path: Path) -> Authority:
    """One that signs by itself."""
    return new_authority(tmp_path / "server", now=NOW)[0]


@pytest.fixture
def authority(alone: Authority) -> Authority:
    """The same with its directory's authority apart."""
    return replace(alone, apart=KEY.public_key())


def enrolled(authority: Authority, site: str = "icu-1") -> Principal:
    token = Token.decode(authority.issue_token(site, now=NOW)).principal
    return principal_of(enrol(authority, token, REQUEST, now=NOW))


def signed(directory: Directory, key: ec.EllipticCurvePrivateKey = KEY) -> SignedDirectory:
    return SignedDirectory(directory, directory.sign(key))


def test_a_coordinator_whose_authority_is_apart_never_signs(authority: Authority) -> None:
    site = enrolled(authority)
    authority.renew(site, REQUEST, now=NOW)
    authority.revoke("icu-1", now=NOW)
    authority.directories.settle(now=NOW)
    with pytest.raises(ConfigError, match=r"found a \[directory\] authority in server.toml"):
        authority.directories.renew(now=NOW)
    assert authority.registry.directory(authority.federation) is None
    with pytest.raises(RunError, match="has to run `fedge server directory export`, then sign and import it"):
        authority.directories.newest()


def test_what_is_pending_is_signed_elsewhere_and_taken(authority: Authority) -> None:
    enrolled(authority)
    enrolled(authority, "icu-2")
    assert authority.directories.changes(now=NOW).added == ("icu-1", "icu-2")
    pending = authority.directories.pending(now=NOW)
    authority.directories.take(signed(pending), now=NOW)
    assert authority.directories.newest().directory == pending
    assert not authority.directories.changes(now=NOW).any
    authority.revoke("icu-1", now=NOW)
    assert authority.directories.changes(now=NOW).removed == ("icu-1",)
    assert authority.directories.newest().directory == pending, "until the authority says otherwise"
    after = authority.directories.pending(now=NOW)
    assert after.epoch > pending.epoch
    authority.directories.take(signed(after), now=NOW)
    assert [each.site for each in authority.directories.newest().directory.statements] == ["icu-2"]


def test_what_the_authority_has_not_signed_for_this_federation_and_a_new_epoch_is_not_taken(
    authority: Authority, alone: Authority
) -> None:
    enrolled(authority)
    pending = authority.directories.pending(now=NOW)
    stranger = ec.generate_private_key(ec.SECP256R1())
    for bad, message in (
        (signed(pending, stranger), "has signed"),
        (signed(pending, alone.issuer.key), "has signed"),
        (SignedDirectory(replace(pending, epoch=pending.epoch + 1), signed(pending).signature), "has signed"),
        (signed(replace(pending, federation="0" * 16)), "of federation"),
    ):
        with pytest.raises(IdentityError, match=message):
            authority.directories.take(bad, now=NOW)
    authority.directories.take(signed(pending), now=NOW)
    for old in (pending, replace(pending, epoch=pending.epoch - 1), replace(pending, statements=())):
        with pytest.raises(IdentityError, match=f"expected an epoch after {pending.epoch}"):
            authority.directories.take(signed(old), now=NOW)
    with pytest.raises(ConfigError, match="the coordinator signs by itself"):
        alone.directories.take(signed(replace(pending, epoch=pending.epoch + 1), alone.issuer.key), now=NOW)
    assert authority.directories.newest().directory == pending


def test_changing_the_authority_needs_a_new_directory_and_epochs_go_on(
    alone: Authority, authority: Authority
) -> None:
    enrolled(alone)
    first = alone.directories.newest().directory
    with pytest.raises(RunError, match="is not signed by the authority that counts now"):
        authority.directories.newest()
    assert authority.directories.changes(now=NOW).added == ("icu-1",)
    pending = authority.directories.pending(now=NOW)
    assert pending.epoch > first.epoch
    authority.directories.take(signed(pending), now=NOW)
    with pytest.raises(RunError, match="start the coordinator again"):
        alone.directories.newest()
    alone.directories.settle(now=NOW)
    assert alone.directories.newest().directory.epoch > pending.epoch


def test_a_directory_can_be_signed_anew_although_nothing_has_changed(alone: Authority) -> None:
    enrolled(alone)
    first = alone.directories.newest().directory
    second = alone.directories.renew(now=NOW).directory
    assert second.epoch > first.epoch
    assert second.statements == first.statements


def test_changes_are_told_by_site() -> None:
    def of(site: str, key: int = 1, until: int = 10) -> Statement:
        return Statement(site, bytes([key]) * 32, 0, until)

    old = (of("a"), of("b"), of("c"), of("d"), of("e", until=20))
    new = (of("b", key=2), of("c", until=11), of("d"), of("e"), of("f"))
    assert Changes.between(old, new) == Changes(("f",), ("a",), ("b",), ("c",))
    assert Changes.between(old, old) == Changes()
    assert not Changes.between(old, old).any


# As the coordinator asks for it.


def test_membership_has_the_newest_directory_and_the_same_one_until_it_changes(authority: Authority) -> None:
    async def scenario() -> None:
        membership = Membership(authority)
        beside = replace(load_authority(authority.folder), apart=KEY.public_key())
        try:
            with pytest.raises(RunError, match="not signed yet"):
                await membership.directory()
            enrolled(authority)
            beside.directories.take(signed(beside.directories.pending(now=NOW)), now=NOW)
            first = await membership.directory()
            assert first.directory.key("icu-1") is not None
            assert await membership.directory() is first
            await membership.revoke("icu-1", actor="ops")
            assert await membership.directory() is first
            beside.directories.take(signed(beside.directories.pending(now=NOW)), now=NOW)
            second = await membership.directory()
            assert second.directory.epoch > first.directory.epoch
            assert second.directory.statements == ()
        finally:
            membership.close()

    asyncio.run(scenario())


# The file.


DIRECTORY = Directory.of(
    "f" * 16, 7, [Statement("icu-2", b"b" * 32, 1, 2**40), Statement("icu-1", b"a" * 32, 1, 2)]
)


def test_a_directory_survives_its_file_which_is_private_and_always_the_same_text(tmp_path: Path) -> None:
    plain, complete = tmp_path / "plain.json", tmp_path / "signed.json"
    write_directory(plain, DIRECTORY)
    assert read_unsigned(plain) == DIRECTORY
    write_directory(complete, DIRECTORY, b"signature")
    assert read_signed(complete) == SignedDirectory(DIRECTORY, b"signature")
    assert plain.stat().st_mode & 0o777 == 0o600
    text = plain.read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) + "\n"


def test_signed_and_unsigned_files_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_directory(path, DIRECTORY)
    with pytest.raises(ConfigError, match="expected a signed directory"):
        read_signed(path)
    write_directory(path, DIRECTORY, b"signature")
    with pytest.raises(ConfigError, match="found a signed one"):
        read_unsigned(path)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda t: t[: len(t) // 2], "expected a directory as JSON"),
        (lambda t: "", "expected a directory as JSON"),
        (lambda t: "[]", "expected a directory as JSON"),
        (lambda t: "[" * 100_000, "expected a directory as JSON"),
        (lambda t: t.replace('"epoch":7', '"epoch":7,"epoch":8'), "a key is there twice"),
        (lambda t: t.replace('"epoch":7', '"epoch":0'), "epoch"),
        (lambda t: t.replace('"epoch":7', '"epoch":true'), "epoch"),
        (lambda t: t.replace('"epoch":7', '"epoch":7.0'), "epoch"),
        (lambda t: t.replace('"epoch":7', f'"epoch":{2**64}'), "epoch"),
        (lambda t: t.replace('"epoch":7,', ""), "epoch"),
        (lambda t: t.replace('"epoch"', '"epok"'), "epok"),
        (lambda t: t.replace("directory 1", "directory 2"), "format"),
        (lambda t: t.replace("f" * 16, "g" * 16), "federation"),
        (lambda t: t.replace("icu-1", "../x"), "site name"),
        (lambda t: t.replace("icu-1", "icu-2"), "each site once"),
        (lambda t: t.replace("61" * 32, "61" * 31), "key"),
        (lambda t: t.replace('"not_before":1', '"not_before":-1'), "not_before"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, spoil: Callable[[str], str], named: str
) -> None:
    path: Any = tmp_path / "file.json"
    write_directory(path, DIRECTORY)
    spoiled = spoil(path.read_text())
    assert spoiled != path.read_text()
    path.write_text(spoiled)
    with pytest.raises(ConfigError, match=named) as caught:
        read_unsigned(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text_or_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found none"):
        read_signed(tmp_path / "absent.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="as JSON"):
        read_signed(tmp_path / "bytes")
