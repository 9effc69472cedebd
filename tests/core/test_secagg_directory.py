"""The directory of identity keys: signed by the CA, never older than what was seen, and only what is valid now."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from secagg_sessions import FEDERATION, directory_of, name

from fedge.errors import IdentityError
from fedge.secagg.directory import Directory, Statement

CA = ec.generate_private_key(ec.SECP256R1())
NOW = 1_700_000_000.0


def check(directory: Directory, signature: bytes | None = None, **changes: object) -> Directory:
    known = {"federation": FEDERATION, "now_s": NOW} | changes
    return directory.check(
        directory.sign(CA) if signature is None else signature,
        CA.public_key(),
        **known,  # type: ignore[arg-type]
    )


def test_a_directory_that_the_ca_has_signed_gives_each_active_sites_key():
    directory = check(directory_of(3))
    assert directory.key(name(2)) == directory_of(3).key(name(2))
    assert directory.key("somebody") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda d: replace(d, epoch=2),
        lambda d: replace(d, statements=d.statements[:-1]),
        lambda d: replace(d, statements=(replace(d.statements[0], key=b"k" * 32), *d.statements[1:])),
        lambda d: replace(d, statements=(replace(d.statements[0], site="x"), *d.statements[1:])),
        lambda d: replace(d, statements=(replace(d.statements[0], not_after=2**34), *d.statements[1:])),
    ],
)
def test_a_directory_that_was_changed_is_refused(change):
    directory = directory_of(3)
    with pytest.raises(IdentityError, match="CA has signed"):
        check(change(directory), directory.sign(CA))


@pytest.mark.parametrize("signature", [b"", b"x" * 70])
def test_a_signature_that_is_none_is_refused(signature: bytes):
    with pytest.raises(IdentityError, match="CA has signed"):
        check(directory_of(3), signature)


def test_another_ca_is_refused():
    with pytest.raises(IdentityError, match="CA has signed"):
        check(directory_of(3), directory_of(3).sign(ec.generate_private_key(ec.SECP256R1())))


def test_the_order_of_statements_does_not_matter():
    directory = directory_of(3)
    turned = replace(directory, statements=directory.statements[::-1])
    assert turned.digest == directory.digest
    check(turned, directory.sign(CA))


def test_an_older_directory_than_was_seen_is_refused():
    newest = directory_of(3, epoch=7)
    seen = (newest.epoch, newest.digest)
    check(newest, seen=seen)
    check(directory_of(4, epoch=8), seen=seen)
    with pytest.raises(IdentityError, match="expected epoch 7 as it was, or a later one, found epoch 6"):
        check(directory_of(3, epoch=6), seen=seen)
    with pytest.raises(IdentityError, match="found another"):
        check(directory_of(4, epoch=7), seen=seen)


def test_the_first_directory_may_be_of_any_epoch():
    assert check(directory_of(3, epoch=0)).epoch == 0
    assert check(directory_of(3, epoch=5), seen=(5, b"")).epoch == 5


@pytest.mark.parametrize(
    "directory",
    [
        replace(directory_of(3), epoch=-1),
        replace(directory_of(3), epoch=2**64),
        Directory.of(FEDERATION, 1, [Statement("a", b"a" * 32, -1, 2**33)]),
    ],
)
def test_numbers_that_nobody_can_have_signed_are_refused_like_any_others(directory: Directory):
    with pytest.raises(IdentityError, match="CA has signed"):
        check(directory, b"x" * 70)


def test_a_directory_of_more_sites_than_one_holds_is_refused(monkeypatch):
    monkeypatch.setattr("fedge.secagg.directory.MAX_STATEMENTS", 3)
    check(directory_of(3))
    with pytest.raises(IdentityError, match="at most 3 sites"):
        check(directory_of(4))


def test_another_federations_directory_is_refused():
    with pytest.raises(IdentityError, match="of federation"):
        check(directory_of(3), federation="f" * 16)


def test_statements_count_while_they_are_valid_with_a_clocks_error_before():
    lines = [
        Statement("early", b"a" * 32, int(NOW) + 300, int(NOW) + 1000),
        Statement("future", b"b" * 32, int(NOW) + 600, int(NOW) + 1000),
        Statement("over", b"c" * 32, 0, int(NOW) - 1),
        Statement("now", b"d" * 32, 0, int(NOW)),
    ]
    directory = check(Directory.of(FEDERATION, 1, lines))
    assert [site for site in ("early", "future", "over", "now") if directory.key(site)] == ["early", "now"]


@pytest.mark.parametrize(
    "lines",
    [
        [Statement("a", b"a" * 32, 0, 2**33), Statement("a", b"b" * 32, 0, 2**33)],
        [Statement("a", b"short", 0, 2**33)],
    ],
)
def test_lists_that_say_two_things_or_hold_no_keys_are_refused(lines):
    with pytest.raises(IdentityError, match="directory of sites: expected"):
        check(Directory.of(FEDERATION, 1, lines))
