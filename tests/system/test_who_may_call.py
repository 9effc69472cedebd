"""Mutual TLS and roles: who is let in, who is told no, and in which words."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import authorities
import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from harness import Federation, coordinator, fedge, set_tables
from scripted import Stream, channel, status_of

from fedge.files import write_private
from fedge.principal import key_to_pem
from fedge.signing import make_signing_key
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge_client.identity import Identity, make_csr, open_token
from fedge_server.certificates import issue_client, to_pem
from fedge_server.clock import now
from fedge_server.state import authority_beside


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A second federation, with a CA of its own."""
    with coordinator(tmp_path_factory.mktemp("other")) as started:
        yield started


@pytest.fixture(scope="module")
def site(bare: Federation) -> Identity:
    return bare.enrol("member")


def unrecorded(federation: Federation, folder: Path, *, name: str) -> Path:
    """A site's folder of PEM files that this federation's CA signed, without any record of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = issue_client(
        federation.authority.issuer,
        key.public_key(),
        role="site",
        name=name,
        now=now(),
        valid=timedelta(days=1),
    )
    folder.mkdir()
    write_private(folder / "client.key", key_to_pem(key))
    write_private(folder / "signing.key", make_signing_key())
    write_private(folder / "client.pem", to_pem(certificate))
    write_private(folder / "ca.pem", federation.authority.ca_pem)
    return folder


def admin_identity(federation: Federation) -> Identity:
    """The admin's credential, where a site's is expected."""
    key, certificate, ca = (
        (federation.home / name).read_bytes() for name in ("admin.key", "admin.pem", "ca.pem")
    )
    return Identity(None, key, certificate, ca, signing_pem=b"")  # type: ignore[arg-type]


def bootstrap_identity(federation: Federation, site: str) -> Identity:
    """What a token lets its holder be."""
    ca = federation.authority.ca_pem
    token = open_token(federation.authority.issue_token(site, now=now()), ca_pem=ca, now=now())
    return Identity(token.principal, token.key_pem, token.certificate_pem, ca, signing_pem=b"")


def enrol(federation: Federation, folder: Path, token: str, *, ca: Path | None = None) -> tuple[int, str]:
    """`fedge client enrol`: its exit code and what it said."""
    done = fedge(
        "client",
        "enrol",
        "--server",
        federation.address,
        "--token",
        token,
        "--ca",
        ca or federation.home / "ca.pem",
        "--dir",
        folder,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


FEDERATION_CALLS: dict[str, Callable[[services.FederationStub], object]] = {
    "Session": lambda stub: _session(stub),
    "Fetch": lambda stub: list(stub.Fetch(pb.FetchRequest())),
    "Deliver": lambda stub: stub.Deliver(iter([pb.DeliverRequest(update=pb.Update())])),
    "Renew": lambda stub: stub.Renew(pb.EnrolRequest(csr=make_csr()[1])),
    "Keys": lambda stub: stub.Keys(pb.DirectoryRequest()),
}
ADMIN_CALLS: dict[str, Callable[[services.AdminStub], object]] = {
    "Submit": lambda stub: stub.Submit(iter([pb.SubmitRequest(submission=pb.Submission())])),
    "List": lambda stub: stub.List(pb.ListRequest()),
    "Show": lambda stub: stub.Show(pb.RunRef(run_id="any")),
    "Watch": lambda stub: list(stub.Watch(pb.RunRef(run_id="any"))),
    "Stop": lambda stub: stub.Stop(pb.RunRef(run_id="any")),
    "Export": lambda stub: list(stub.Export(pb.RunRef(run_id="any"))),
    "Sites": lambda stub: stub.Sites(pb.SitesRequest()),
    "Revoke": lambda stub: stub.Revoke(pb.SiteRef(name="member")),
}


def _session(stub: services.FederationStub) -> None:
    stream = Stream(stub)
    status, details = stream.end()
    stream.cancel()
    if status != grpc.StatusCode.OK:
        raise _Refused(status, details)


class _Refused(grpc.RpcError):
    def __init__(self, status: grpc.StatusCode | None, details: str) -> None:
        self.code, self.details = (lambda: status), (lambda: details)


@pytest.mark.parametrize("call", ADMIN_CALLS)
def test_a_site_may_not_administer(bare: Federation, site: Identity, call: str) -> None:
    with channel(bare.address, site) as opened:
        status, details = status_of(lambda: ADMIN_CALLS[call](services.AdminStub(opened)))
    assert status == grpc.StatusCode.PERMISSION_DENIED
    assert "'admin'" in details


@pytest.mark.parametrize("call", FEDERATION_CALLS)
def test_an_admin_is_no_site(bare: Federation, call: str) -> None:
    with channel(bare.address, admin_identity(bare)) as opened:
        status, details = status_of(lambda: FEDERATION_CALLS[call](services.FederationStub(opened)))
    assert status == grpc.StatusCode.PERMISSION_DENIED
    assert "'site'" in details


def test_a_token_is_good_for_enrolment_and_nothing_else(bare: Federation) -> None:
    with channel(bare.address, bootstrap_identity(bare, "newcomer")) as opened:
        federation, admin = services.FederationStub(opened), services.AdminStub(opened)
        calls = [lambda call=call: call(federation) for call in FEDERATION_CALLS.values()]
        calls += [lambda call=call: call(admin) for call in ADMIN_CALLS.values()]
        assert {status_of(call)[0] for call in calls} == {grpc.StatusCode.PERMISSION_DENIED}


def test_a_site_may_not_enrol_again_without_a_token(bare: Federation, site: Identity) -> None:
    with channel(bare.address, site) as opened:
        request = pb.EnrolRequest(csr=make_csr()[1])
        status, _ = status_of(lambda: services.EnrolmentStub(opened).Enrol(request))
    assert status == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("encrypted", [True, False])
def test_without_a_certificate_there_is_no_connection(bare: Federation, encrypted: bool) -> None:
    credentials = grpc.ssl_channel_credentials(bare.authority.ca_pem)
    with (
        grpc.secure_channel(bare.address, credentials) if encrypted else grpc.insecure_channel(bare.address)
    ) as opened:
        status, _ = status_of(lambda: services.AdminStub(opened).List(pb.ListRequest(), timeout=10))
    assert status == grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_another_federation_opens_nothing(bare: Federation, other: Federation) -> None:
    foreign = other.enrol("member")
    mixed = Identity(
        foreign.principal,
        key_pem=foreign.key_pem,
        certificate_pem=foreign.certificate_pem,
        ca_pem=bare.authority.ca_pem,
        signing_pem=b"",
    )
    with channel(bare.address, mixed) as opened:
        status, _ = status_of(lambda: services.AdminStub(opened).List(pb.ListRequest(), timeout=10))
    assert status == grpc.StatusCode.UNAVAILABLE


def test_a_certificate_that_the_ca_signed_but_the_records_do_not_hold_does_not_count(
    bare: Federation, tmp_path: Path
) -> None:
    """A stolen CA key is the end; a stolen signature (a bug, a backup) is not."""
    folder = unrecorded(bare, tmp_path / "forged", name="ghost")
    write_private(folder / "client.toml", f'server = "{bare.address}"\n')
    done = fedge("client", "start", folder / "client.toml")
    assert done.returncode == 5
    assert "'ghost' is not enrolled here" in done.stderr


def test_a_token_enrols_once(bare: Federation, tmp_path: Path) -> None:
    token = bare.authority.issue_token("once", now=now())
    assert enrol(bare, tmp_path / "first", token)[0] == 0
    code, said = enrol(bare, tmp_path / "second", token)
    assert code == 5
    assert "already used" in said
    assert not (tmp_path / "second" / "client.pem").exists()


def test_an_expired_token_is_refused_before_anything_is_sent(bare: Federation, tmp_path: Path) -> None:
    token = bare.authority.issue_token("late", now=now() - timedelta(days=2))
    code, said = enrol(bare, tmp_path / "late", token)
    assert code == 5
    assert "expired" in said
    assert "fedge server token" in said


def test_an_expired_token_opens_nothing_even_if_its_holder_ignores_the_date(bare: Federation) -> None:
    token = open_token(
        bare.authority.issue_token("late", now=now() - timedelta(days=2)),
        ca_pem=bare.authority.ca_pem,
        now=now() - timedelta(days=2),
    )
    identity = Identity(
        token.principal,
        key_pem=token.key_pem,
        certificate_pem=token.certificate_pem,
        ca_pem=bare.authority.ca_pem,
        signing_pem=b"",
    )
    with channel(bare.address, identity) as opened:
        request = pb.EnrolRequest(csr=make_csr()[1])
        status, _ = status_of(lambda: services.EnrolmentStub(opened).Enrol(request, timeout=10))
    assert status == grpc.StatusCode.UNAVAILABLE


def test_a_token_and_the_ca_file_of_another_coordinator_are_told_apart(
    bare: Federation, other: Federation, tmp_path: Path
) -> None:
    token = bare.authority.issue_token("mixed", now=now())
    code, said = enrol(bare, tmp_path / "mixed", token, ca=other.home / "ca.pem")
    assert code == 5
    assert "different coordinators" in said
    foreign = other.authority.issue_token("mixed", now=now())
    code, said = enrol(bare, tmp_path / "mixed", foreign, ca=other.home / "ca.pem")
    assert code == 5
    assert "no trusted connection" in said
    assert enrol(bare, tmp_path / "mixed", token)[0] == 0, "and the token is not spent by that"


@pytest.mark.parametrize("token", ["", "fedge1.AAAA", "-----BEGIN CERTIFICATE-----"])
def test_what_is_no_token_is_called_so(bare: Federation, tmp_path: Path, token: str) -> None:
    code, said = enrol(bare, tmp_path / "nobody", token)
    assert code == 5
    assert "token" in said


def test_an_agent_whose_ca_file_is_another_coordinators_says_so_and_ends(
    bare: Federation, other: Federation, tmp_path: Path
) -> None:
    """Its own certificate is then not of that CA either: found before anything is sent."""
    bare.enrol("confused")
    shutil.copytree(bare.folder / "confused", tmp_path / "confused")
    write_private(tmp_path / "confused" / "ca.pem", other.authority.ca_pem)
    done = fedge("client", "start", tmp_path / "confused" / "client.toml")
    assert done.returncode == 5
    assert "ca.pem" in done.stderr


def test_an_agent_that_calls_another_coordinator_says_so_and_ends(
    bare: Federation, other: Federation
) -> None:
    bare.enrol("lost")
    path = bare.folder / "lost" / "client.toml"
    set_tables(path, {"server": other.address})
    for command in ("start", "check"):
        done = fedge("client", command, path)
        assert done.returncode == 5
        assert "no trusted connection" in done.stderr


def test_an_agent_whose_certificate_has_expired_says_so_and_ends(bare: Federation) -> None:
    identity = bare.enrol("aged")
    authority = bare.authority
    token = open_token(authority.issue_token("aged", now=now()), ca_pem=authority.ca_pem, now=now())
    csr = make_csr(identity.key_pem)[1]
    old = authorities.enrol(authority, token.principal, csr, now=now(), valid_for_s=-60)
    write_private(bare.folder / "aged" / "client.pem", old)
    done = fedge("client", "start", bare.folder / "aged" / "client.toml")
    assert done.returncode == 5
    assert "expired" in done.stderr
    assert "fedge client enrol" in done.stderr


def test_a_coordinator_whose_own_certificate_has_expired_does_not_start(
    other: Federation, tmp_path: Path
) -> None:
    home = tmp_path / "expired"
    shutil.copytree(other.home, home)
    with authority_beside(home / "server.toml") as authority:
        authority.issue_server(hosts=[], now=now() - timedelta(days=800))
    done = fedge("server", "start", home / "server.toml")
    assert done.returncode == 5
    assert "expired" in done.stderr


def test_a_revoked_site_ends_with_a_clear_message_and_stays_out(bare: Federation) -> None:
    bare.enrol("traitor")
    agent = bare.start("traitor")
    assert fedge("site", "revoke", "traitor", "--admin", bare.admin_toml).returncode == 0
    assert agent.ends() == 5
    assert "'traitor' is revoked" in agent.output
    assert "Traceback" not in agent.output
    assert "traitor" not in bare.connected()
    again = fedge("client", "start", bare.folder / "traitor" / "client.toml")
    assert again.returncode == 5
    assert "'traitor' is revoked" in again.stderr
    with channel(bare.address, bare.enrol("traitor")) as opened:  # a new token lets it in again
        stream = Stream(services.FederationStub(opened))
        stream.next("welcome")
        stream.cancel()


def test_a_site_that_enrols_again_shuts_out_whoever_has_its_old_key(bare: Federation) -> None:
    old = bare.enrol("reinstalled")
    with channel(bare.address, old) as opened:
        stream = Stream(services.FederationStub(opened))
        stream.next("welcome")
        bare.enrol("reinstalled")
        # The session was open before: it would go on to be given orders, and models with them.
        assert stream.next("closing").reason == "the site was enrolled again"
        stream.end()
        status, details = status_of(lambda: _session(services.FederationStub(opened)))
        assert status == grpc.StatusCode.PERMISSION_DENIED
        assert "superseded" in details
        stream.cancel()


def test_revoking_whom_nobody_knows_is_an_error_that_names_the_nearest(bare: Federation) -> None:
    bare.enrol("st-mary")
    done = fedge("site", "revoke", "st-marry", "--admin", bare.admin_toml)
    assert done.returncode == 2
    assert "st-mary" in done.stderr
