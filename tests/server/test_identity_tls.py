"""What TLS makes of our certificates, in real handshakes: one port, a client certificate from everybody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from authorities import enrol, new_authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.principal import Token, key_to_pem, principal_of
from fedge_server.identity import Authority, Credential

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "server", hosts=[], now=NOW)[0]


def csr(key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


@contextmanager
def coordinator(credential: Credential, ca_pem: bytes) -> Iterator[str]:
    """A real gRPC server on loopback whose only method answers with the caller's URI."""

    def who(request: bytes, context: grpc.ServicerContext) -> bytes:
        found: Any = context.auth_context()["x509_pem_cert"]  # a list; its stubs say bytes
        (pem,) = found
        return principal_of(pem).uri.encode()

    handler = grpc.method_handlers_generic_handler("t", {"who": grpc.unary_unary_rpc_method_handler(who)})
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((handler,))
        pair = (credential.key_pem, credential.certificate_pem)
        tls = grpc.ssl_server_credentials([pair], root_certificates=ca_pem, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", tls)
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def call(address: str, ca_pem: bytes, pair: tuple[bytes, bytes] | None) -> str:
    key, certificate = pair or (None, None)
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca_pem, key, certificate)) as channel:
        reply: bytes = channel.unary_unary("/t/who", bytes, bytes)(b"", timeout=20)
        return reply.decode()


def credentials(authority: Authority, *, now: datetime) -> dict[str, tuple[bytes, bytes]]:
    """A key and certificate of each role that calls, issued at `now`."""
    token = Token.decode(authority.issue_token("icu-1", now=now))
    key = ec.generate_private_key(ec.SECP256R1())
    admin = authority.issue_admin("ops", now=now)
    return {
        "enrol/icu-1": (token.key_pem, token.certificate_pem),
        "site/icu-1": (key_to_pem(key), enrol(authority, token.principal, csr(key), now=now)),
        "admin/ops": (admin.key_pem, admin.certificate_pem),
    }


def refused(address: str, ca_pem: bytes, pair: tuple[bytes, bytes] | None) -> bool:
    try:
        call(address, ca_pem, pair)
    except grpc.RpcError as error:
        return bool(error.code() == grpc.StatusCode.UNAVAILABLE)
    return False


def test_tls_lets_in_every_role_and_tells_the_service_who_it_is(authority: Authority) -> None:
    with coordinator(authority.server_credential(now=NOW), authority.ca_pem) as address:
        for path, pair in credentials(authority, now=NOW).items():
            assert call(address, authority.ca_pem, pair) == f"fedge://{authority.federation}/{path}"
            port = address.rpartition(":")[2]
            assert call(f"localhost:{port}", authority.ca_pem, pair).endswith(path)


def test_tls_refuses_callers_without_a_valid_certificate_of_this_ca(
    authority: Authority, tmp_path: Path
) -> None:
    foreign = new_authority(tmp_path / "foreign", hosts=[], now=NOW)[0]
    own = authority.server_credential(now=NOW)
    with coordinator(own, authority.ca_pem) as address:
        good = credentials(authority, now=NOW)
        for pair in credentials(foreign, now=NOW).values():
            assert refused(address, authority.ca_pem, pair)
        for pair in credentials(authority, now=NOW - 400 * DAY).values():
            assert refused(address, authority.ca_pem, pair), "expired"
        assert refused(address, authority.ca_pem, None), "no certificate"
        assert refused(address, authority.ca_pem, (own.key_pem, own.certificate_pem)), (
            "a server's is no client's"
        )
        assert call(address, authority.ca_pem, good["site/icu-1"]).endswith("site/icu-1")


def test_a_client_refuses_a_coordinator_of_another_ca_and_a_site_that_plays_coordinator(
    authority: Authority, tmp_path: Path
) -> None:
    foreign = new_authority(tmp_path / "foreign", hosts=[], now=NOW)[0]
    pairs = credentials(authority, now=NOW)
    with coordinator(foreign.server_credential(now=NOW), authority.ca_pem) as address:
        assert refused(address, authority.ca_pem, pairs["site/icu-1"])
        assert call(address, foreign.ca_pem, pairs["site/icu-1"]).endswith("site/icu-1")
    key, certificate = pairs["admin/ops"]
    impostor = Credential(principal_of(certificate), certificate_pem=certificate, key_pem=key)
    with coordinator(impostor, authority.ca_pem) as address:
        assert refused(address, authority.ca_pem, pairs["site/icu-1"])


def test_the_addresses_in_a_certificate_are_the_ones_that_a_client_accepts(tmp_path: Path) -> None:
    other = "127.0.0.2"
    for hosts, accepted in (([], False), ([other], True)):
        authority = new_authority(tmp_path / str(accepted), hosts=hosts, now=NOW)[0]
        pair = credentials(authority, now=NOW)["site/icu-1"]
        with coordinator(authority.server_credential(now=NOW), authority.ca_pem) as address:
            port = address.rpartition(":")[2]
            assert refused(f"127.0.0.1:{port}", authority.ca_pem, pair) is False
            # 127.0.0.2 is this machine too, but the server listens on 127.0.0.1: reached by name override.
            options = [("grpc.ssl_target_name_override", other)]
            tls = grpc.ssl_channel_credentials(authority.ca_pem, *pair)
            with grpc.secure_channel(address, tls, options=options) as channel:
                try:
                    channel.unary_unary("/t/who", bytes, bytes)(b"", timeout=20)
                    answered = True
                except grpc.RpcError:
                    answered = False
            assert answered is accepted
