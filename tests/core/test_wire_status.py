"""Errors as gRPC statuses and back, and the addresses that peers are reached at."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import errors
from fedge.errors import FedgeError, RemoteProtocolError
from fedge.wire.address import check_address, split_address
from fedge.wire.status import error_of, status_of

# Statuses.

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FedgeError) and not issubclass(kind, errors.RefusedError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_has_a_status_that_grpc_knows_and_that_means_an_error_of_ours(kind):
    status = status_of(kind("why"))
    assert status in grpc.StatusCode.__members__
    back = error_of(status, "why", peer="host:1")
    assert "why" in str(back)
    assert back.exit_code != 0


def test_a_status_means_the_kind_of_error_that_the_peer_had():
    for kind in (errors.IdentityError, errors.LimitError, errors.RunError, errors.ConfigError):
        assert type(error_of(status_of(kind("why")), "why", peer="host:1")) is kind
    # Our mistake in the peer's eyes, and the peer's own trouble, are other things on this side.
    assert type(error_of(status_of(RemoteProtocolError("x")), "x", peer="h:1")) is errors.ConfigError
    assert type(error_of(status_of(errors.StorageError("x")), "x", peer="h:1")) is errors.LinkError


@pytest.mark.parametrize("status", grpc.StatusCode.__members__)
def test_every_status_becomes_an_error_with_printable_text(status):
    error = error_of(status, "a\x1b[2Jb", peer="host:1")
    assert isinstance(error, FedgeError)
    assert str(error).isprintable()


def test_an_unreachable_peer_and_an_untrusted_one_are_told_apart():
    assert type(error_of("UNAVAILABLE", "connection refused", peer="h:1")) is errors.LinkError
    untrusted = error_of("UNAVAILABLE", "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", peer="h:1")
    assert type(untrusted) is errors.IdentityError
    assert "h:1" in str(untrusted)


# Addresses.


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("fl.example.org:8443", ("fl.example.org", 8443)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(address, parts):
    assert split_address(address) == parts
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":1",
        "host:65536",
        "host:-1",
        "a b:1",
        "::1:80",
        "http://h:1",
        "h:1\n",
        "h:\u0661",
    ],
)
def test_what_is_not_host_and_port_is_refused(address):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        check_address(address)


@given(st.one_of(st.text(max_size=12), st.text("a.[]:09\u0661", max_size=9)))
def test_any_text_is_an_address_or_a_value_error(text):
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert host
    assert host.isascii()
    assert 0 <= port <= 65535


@pytest.mark.parametrize(
    "details",
    [
        "Handshake read failed (Endpoint closing)",
        "tcp handshaker shutdown",
        "Ssl handshake failed: recvmsg:Connection reset by peer",
        "TLS handshake timed out",
    ],
)
def test_a_handshake_that_the_link_broke_off_says_nothing_about_anybodys_certificate(details):
    """Found by a benchmark: an agent on a slow link took it for a refusal of its identity, and ended."""
    assert type(error_of("UNAVAILABLE", details, peer="h:1")) is errors.LinkError


def test_a_peer_that_is_busy_says_when_to_come_back_within_reason():
    def told(text: str) -> float:
        busy = error_of("UNAVAILABLE", "full", peer="h:1", retry_after=text)
        assert isinstance(busy, errors.BusyError)
        return busy.retry_after_s

    found = [told(text) for text in ("1.5", "-1", "1e9", "nan", "inf", "soon")]
    assert found == [1.5, 0.0, 3600.0, 1.0, 1.0, 1.0]
