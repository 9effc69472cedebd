"""What a site remembers of the directory of keys, and what it refuses to be shown after that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from authorities import enrolled, new_authority
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import IdentityError, LimitError, LinkError, RefusedError, RemoteProtocolError, StorageError
from fedge.refusal import RefusalCode
from fedge.secagg.directory import Directory, Statement
from fedge.signing import (
    SignedDirectory,
    authority_to_pem,
    public_bytes,
)
from fedge.wire import fedge_pb2 as pb
from fedge.wire.keys import encode_directory
from fedge_client import directory as client_directory
from fedge_client.directory import KnownDirectory
from fedge_client.identity import Identity, make_csr
from fedge_server.identity import Authority

NOW = datetime.now(UTC).replace(microsecond=0)
START, END = int(NOW.timestamp()) - 60, int(NOW.timestamp()) + 86_400


@dataclass
class Coordinator:
    """Serves what it is told to, and counts."""

    message: pb.Directory = field(default_factory=pb.Directory)
    asked: int = 0

    async def keys(self) -> pb.Directory:
        self.asked += 1
        return self.message

    def serves(self, signed: SignedDirectory) -> None:
        self.message = encode_directory(signed)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "server", now=NOW)[0]


@pytest.fixture
def identity(authority: Authority) -> Identity:
    return enrolled(authority, "icu-1", now=NOW)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "site"
    path.mkdir()
    return path


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


Signs = Callable[..., SignedDirectory]


@pytest.fixture
def sign(authority: Authority, identity: Identity) -> Signs:
    """A directory of `epoch` with this site and another, signed by the CA unless told otherwise."""

    def signed(
        epoch: int,
        *,
        key: ec.EllipticCurvePrivateKey | None = None,
        other: bytes = b"o" * 32,
        own: bytes = b"",
        until: int = END,
        federation: str = "",
    ) -> SignedDirectory:
        own = own or public_bytes(identity.signing)
        statements = [Statement("icu-1", own, START, until), Statement("icu-2", other, START, END)]
        directory = Directory.of(federation or authority.federation, epoch, statements)
        return SignedDirectory(directory, directory.sign(key or authority.issuer.key))

    return signed


def at(known: KnownDirectory, epoch: int, coordinator: Coordinator) -> Directory:
    return asyncio.run(known.at(epoch, coordinator))


def refused(known: KnownDirectory, epoch: int, coordinator: Coordinator, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        at(known, epoch, coordinator)
    assert caught.value.refusal.code is RefusalCode.ROSTER_INVALID


def test_a_directory_is_fetched_once_and_remembered_across_restarts(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    known = KnownDirectory.open(folder, identity)
    assert known.epoch == 0
    coordinator.serves(sign(7))
    assert at(known, 7, coordinator) == sign(7).directory
    assert at(known, 7, coordinator).key("icu-2") == b"o" * 32
    again = KnownDirectory.open(folder, identity)
    assert again.epoch == 7
    assert at(again, 7, coordinator) == sign(7).directory
    assert coordinator.asked == 1
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_several_that_ask_at_once_fetch_once(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    known = KnownDirectory.open(folder, identity)
    coordinator.serves(sign(7))

    async def ask() -> list[Directory]:
        return await asyncio.gather(*(known.at(7, coordinator) for _ in range(5)))

    assert asyncio.run(ask()) == [sign(7).directory] * 5
    assert coordinator.asked == 1


def test_an_older_directory_is_refused_even_after_a_restart(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    coordinator.serves(sign(7))
    at(KnownDirectory.open(folder, identity), 7, coordinator)
    coordinator.serves(sign(6))
    for known in (KnownDirectory.open(folder, identity), KnownDirectory.open(folder, identity)):
        refused(known, 6, coordinator, "expected keys of epoch 7 or later")
        assert coordinator.asked == 1, "not even asked for"
        refused(known, 8, coordinator, "found epoch 6")
        coordinator.asked = 1
    assert KnownDirectory.open(folder, identity).epoch == 7


def test_another_directory_of_the_same_epoch_is_refused_even_after_a_restart(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    coordinator.serves(sign(7))
    at(KnownDirectory.open(folder, identity), 7, coordinator)
    coordinator.serves(sign(7, other=b"x" * 32))
    again = KnownDirectory.open(folder, identity)
    assert at(again, 7, coordinator).key("icu-2") == b"o" * 32, "what was seen stays"
    refused(again, 8, coordinator, "expected epoch 7 as it was, or a later one, found another")
    assert at(again, 7, coordinator).key("icu-2") == b"o" * 32


@pytest.mark.parametrize("served", [6, 8])
def test_another_epoch_than_asked_for_is_refused_and_yet_remembered(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs, served: int
) -> None:
    coordinator.serves(sign(served))
    known = KnownDirectory.open(folder, identity)
    refused(
        known, 7, coordinator, f"expected the keys of epoch 7, found a coordinator that serves epoch {served}"
    )
    assert KnownDirectory.open(folder, identity).epoch == served
    assert at(known, served, coordinator).epoch == served
    assert coordinator.asked == 1


def test_what_the_authority_has_not_signed_is_refused_and_not_remembered(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    known = KnownDirectory.open(folder, identity)
    good = sign(7)
    for bad in (
        sign(7, key=ec.generate_private_key(ec.SECP256R1())),
        SignedDirectory(replace(good.directory, epoch=8), good.signature),
        SignedDirectory(replace(good.directory, statements=good.directory.statements[:1]), good.signature),
        sign(7, federation="0" * 16),
    ):
        coordinator.serves(bad)
        refused(known, bad.directory.epoch, coordinator, "directory of sites: expected")
    assert known.epoch == 0
    assert list(folder.iterdir()) == []


def test_a_site_whose_key_is_another_under_its_name_takes_no_part(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    coordinator.serves(sign(7, own=b"m" * 32))
    refused(KnownDirectory.open(folder, identity), 7, coordinator, "somebody else signs as this site")


def test_a_site_that_is_not_on_the_directory_or_not_any_more_says_so(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    coordinator.serves(sign(7))
    later = END + 1.0
    known = KnownDirectory.open(folder, identity, clock=lambda: later)
    refused(known, 7, coordinator, "has no key of icu-1 that is valid now")


def test_statements_that_have_expired_since_are_left_out(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    clock = [NOW.timestamp()]
    known = KnownDirectory.open(folder, identity, clock=lambda: clock[0])
    coordinator.serves(sign(7, until=END + 1000))
    assert at(known, 7, coordinator).key("icu-2") is not None
    clock[0] = END + 1.0
    assert at(known, 7, coordinator).key("icu-2") is None
    assert coordinator.asked == 1


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (pb.Directory(), LimitError),
        (pb.Directory(federation="f"), RemoteProtocolError),
        (pb.Directory(federation="f", epoch=7, signature=b"s" * 100), RemoteProtocolError),
        (
            pb.Directory(federation="f", epoch=7, signature=b"s", statements=[pb.Statement(site="../x")]),
            RemoteProtocolError,
        ),
    ],
)
def test_a_malformed_directory_is_the_coordinators_fault(
    identity: Identity, folder: Path, coordinator: Coordinator, message: pb.Directory, error: type[Exception]
) -> None:
    coordinator.message = message
    known = KnownDirectory.open(folder, identity)
    with pytest.raises(error):
        at(known, 7, coordinator)
    assert (known.epoch, list(folder.iterdir())) == (0, [])


def test_what_cannot_be_remembered_is_not_used(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise StorageError("full")

    known = KnownDirectory.open(folder, identity)
    coordinator.serves(sign(7))
    with monkeypatch.context() as patch:
        patch.setattr(client_directory, "write_private", full)
        with pytest.raises(StorageError, match="full"):
            at(known, 7, coordinator)
    coordinator.serves(sign(6))
    refused(known, 6, coordinator, "expected keys of epoch 7")
    coordinator.serves(sign(7))
    assert at(known, 7, coordinator).epoch == KnownDirectory.open(folder, identity).epoch == 7


def test_a_link_that_breaks_changes_nothing(identity: Identity, folder: Path, sign: Signs) -> None:
    class Broken:
        async def keys(self) -> pb.Directory:
            raise LinkError("broken")

    known = KnownDirectory.open(folder, identity)
    with pytest.raises(LinkError):
        asyncio.run(known.at(7, Broken()))
    assert known.epoch == 0


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\xff" * 50])
def test_a_damaged_memory_is_an_error_and_never_an_empty_one(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs, damage: bytes
) -> None:
    coordinator.serves(sign(7))
    at(KnownDirectory.open(folder, identity), 7, coordinator)
    (path,) = folder.iterdir()
    path.write_bytes(damage)
    with pytest.raises(IdentityError, match=r"directory\.bin: expected the newest directory.*remove it"):
        KnownDirectory.open(folder, identity)


def test_with_another_authority_what_was_seen_still_counts_but_is_fetched_anew(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    coordinator.serves(sign(7))
    at(KnownDirectory.open(folder, identity), 7, coordinator)
    apart = ec.generate_private_key(ec.SECP256R1())
    moved = replace(identity, authority_pem=authority_to_pem(apart.public_key()))
    known = KnownDirectory.open(folder, moved)
    refused(known, 7, coordinator, "has signed")
    coordinator.serves(sign(6, key=apart))
    refused(known, 8, coordinator, "found epoch 6")
    coordinator.serves(sign(8, key=apart))
    assert at(known, 8, coordinator).epoch == 8
    refused(KnownDirectory.open(folder, identity), 8, coordinator, "has signed")


def test_another_federations_memory_does_not_count(
    identity: Identity, folder: Path, coordinator: Coordinator, sign: Signs
) -> None:
    coordinator.serves(sign(7))
    at(KnownDirectory.open(folder, identity), 7, coordinator)
    elsewhere = replace(identity, principal=replace(identity.principal, federation="0" * 16))
    assert KnownDirectory.open(folder, elsewhere).epoch == 0


def test_a_renewed_certificate_needs_no_new_memory(
    authority: Authority, identity: Identity, folder: Path, coordinator: Coordinator
) -> None:
    """The coordinator's own: its newest directory is what a site that it has enrolled accepts."""
    coordinator.serves(authority.directories.newest())
    known = KnownDirectory.open(folder, identity)
    first = at(known, authority.directories.newest().directory.epoch, coordinator)
    authority.renew(identity.principal, make_csr(identity.key_pem)[1], now=NOW + timedelta(minutes=1))
    coordinator.serves(authority.directories.newest())
    second = at(known, authority.directories.newest().directory.epoch, coordinator)
    assert second.epoch > first.epoch
    assert second.key("icu-1") == first.key("icu-1")
