"""The directory as a message: what is sent arrives, and what is malformed is refused before it is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedge.errors import LimitError, RemoteProtocolError
from fedge.secagg.directory import Directory, Statement
from fedge.signing import SignedDirectory
from fedge.wire import fedge_pb2 as pb
from fedge.wire import keys
from fedge.wire.keys import decode_directory, encode_directory
from fedge.wire.limits import MAX_MESSAGE_BYTES

SIGNED = SignedDirectory(
    Directory.of("f" * 16, 7, [Statement(f"site-{n}", bytes([n]) * 32, n, 2**40 + n) for n in range(3)]),
    b"signature",
)


def test_a_directory_survives_the_wire() -> None:
    data = encode_directory(SIGNED).SerializeToString()
    assert decode_directory(pb.Directory.FromString(data)) == SIGNED


def test_an_empty_directory_survives_the_wire() -> None:
    empty = SignedDirectory(Directory.of("f" * 16, 1, []), b"s")
    assert decode_directory(encode_directory(empty)) == empty


def test_the_order_in_which_statements_arrive_does_not_matter() -> None:
    message = encode_directory(SIGNED)
    turned = pb.Directory(
        federation=message.federation,
        epoch=message.epoch,
        statements=list(message.statements)[::-1],
        signature=message.signature,
    )
    assert decode_directory(turned) == SIGNED


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda m: m.ClearField("federation"), LimitError),
        (lambda m: setattr(m, "federation", "f" * 1000), LimitError),
        (lambda m: setattr(m, "federation", "f\x1b[2J"), LimitError),
        (lambda m: m.ClearField("epoch"), RemoteProtocolError),
        (lambda m: m.ClearField("signature"), RemoteProtocolError),
        (lambda m: setattr(m, "signature", b"s" * 81), RemoteProtocolError),
        (lambda m: setattr(m.statements[1], "site", ""), RemoteProtocolError),
        (lambda m: setattr(m.statements[1], "site", "../icu"), RemoteProtocolError),
        (lambda m: setattr(m.statements[1], "site", "x" * 64), RemoteProtocolError),
        (lambda m: setattr(m.statements[1], "key", b"k" * 31), RemoteProtocolError),
        (lambda m: setattr(m.statements[1], "key", b""), RemoteProtocolError),
    ],
)
def test_a_malformed_directory_is_refused(
    spoil: Callable[[pb.Directory], None], error: type[Exception]
) -> None:
    message = encode_directory(SIGNED)
    spoil(message)
    with pytest.raises(error):
        decode_directory(message)


def test_too_many_statements_are_refused_before_any_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_STATEMENTS", 2)
    monkeypatch.setattr(keys, "_statement", lambda _: pytest.fail("looked at"))
    with pytest.raises(LimitError, match="at most 2 sites, found 3"):
        decode_directory(encode_directory(SIGNED))


def test_the_largest_directory_fits_into_a_message() -> None:
    largest = Statement("x" * 63, b"k" * 32, 2**34, 2**34)
    one = Directory.of("f" * 16, 2**40, [largest])
    two = Directory.of("f" * 16, 2**40, [largest, largest])
    sizes = [encode_directory(SignedDirectory(each, b"s" * 72)).ByteSize() for each in (one, two)]
    assert sizes[0] + (sizes[1] - sizes[0]) * keys.MAX_STATEMENTS < MAX_MESSAGE_BYTES
