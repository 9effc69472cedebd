"""The directory of the sites' keys over real TLS, and its authority on another machine, through the real commands."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from authorities import application
from cryptography.hazmat.primitives.asymmetric import ec
from harness import Federation, coordinator, fedge, fedge_ok
from scripted import channel, status_of

from fedge.errors import LinkError, RefusedError, RunError
from fedge.principal import key_to_pem
from fedge.secagg.directory import Directory
from fedge.signing import key_fingerprint, public_bytes
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge_client.directory import KnownDirectory
from fedge_client.enrolment import enrol_site
from fedge_client.identity import Identity, load_identity, make_csr, open_token
from fedge_client.link import Link
from fedge_server.clock import now


def newest(federation: Federation, identity: Identity) -> Directory:
    """The newest directory, as a site that has seen nothing yet takes it over its own link."""

    async def fetch() -> Directory:
        link = Link.of(federation.address, identity)
        try:
            epoch = (await link.keys()).epoch
            known = KnownDirectory.open(federation.folder / identity.site, identity)
            return await known.at(epoch, link)
        finally:
            await link.close()

    return asyncio.run(fetch())


def keys_of(directory: Directory) -> dict[str, bytes]:
    return {each.site: each.key for each in directory.statements}


def own(*identities: Identity) -> dict[str, bytes]:
    return {each.site: public_bytes(each.signing) for each in identities}


def show(federation: Federation) -> dict[str, Any]:
    return dict(
        json.loads(fedge_ok("server", "directory", "show", federation.home / "server.toml", "--json"))
    )


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Federation]:
    with coordinator(tmp_path) as started:
        yield started


# With the CA on the coordinator.


def test_a_site_that_enrols_finds_itself_and_the_others_on_the_directory(alone: Federation) -> None:
    one = alone.enrol("icu-1")
    first = newest(alone, one)
    assert keys_of(first) == own(one)
    two = alone.enrol("icu-2")
    second = newest(alone, one)
    assert keys_of(second) == keys_of(newest(alone, two)) == own(one, two)
    assert second.epoch > first.epoch
    fedge_ok("site", "revoke", "icu-2", "--admin", alone.admin_toml)
    assert keys_of(newest(alone, one)) == own(one)
    again = alone.enrol("icu-1")
    assert public_bytes(again.signing) != public_bytes(one.signing)
    last = newest(alone, again)
    assert keys_of(last) == own(again)
    found = show(alone)
    assert (found["epoch"], found["apart"]) == (last.epoch, False)
    assert [(each["site"], each["key"]) for each in found["sites"]] == [
        ("icu-1", key_fingerprint(public_bytes(again.signing)))
    ]
    assert not any(found["pending"].values())


def test_what_enrol_prints_is_what_the_operator_is_shown(alone: Federation) -> None:
    token = alone.authority.issue_token("icu-1", now=now())
    out = fedge_ok(
        *("client", "enrol", "--server", alone.address, "--token", token),
        *("--ca", alone.home / "ca.pem", "--dir", alone.folder / "icu-1"),
    )
    (printed,) = re.findall(r"signs as\s+([0-9a-f]{32})", out)
    assert show(alone)["sites"][0]["key"] == printed
    assert printed in fedge_ok("server", "directory", "show", alone.home / "server.toml")
    assert (alone.folder / "icu-1" / "signing.key").stat().st_mode & 0o777 == 0o600


def test_an_enrolment_without_its_own_proven_key_is_refused_and_costs_no_token(alone: Federation) -> None:
    ca = alone.authority.ca_pem
    token = open_token(alone.authority.issue_token("icu-1", now=now()), ca_pem=ca, now=now())
    holder = Identity(token.principal, token.key_pem, token.certificate_pem, ca, signing_pem=b"")
    csr = make_csr()[1]
    proven = application(token.principal, csr)
    with channel(alone.address, holder) as opened:
        stub = services.EnrolmentStub(opened)
        for key, proof in ((b"", b""), (proven["key"], b"p" * 64), (b"k" * 32, proven["proof"])):
            request = pb.EnrolRequest(csr=csr, identity_key=key, identity_proof=proof)
            status, details = status_of(lambda request=request: stub.Enrol(request))
            assert status == grpc.StatusCode.INVALID_ARGUMENT
            assert "identity key" in details
        good = pb.EnrolRequest(csr=csr, identity_key=proven["key"], identity_proof=proven["proof"])
        assert stub.Enrol(good).certificate


def test_a_killed_coordinator_shows_the_directory_of_what_it_had_kept(tmp_path: Path) -> None:
    with coordinator(tmp_path) as federation:
        one = federation.enrol("icu-1")
        before = newest(federation, one)
        federation.server.signal(signal.SIGTERM)
        for point, enrolled in (("store.commit", {"icu-1"}), ("store.after", {"icu-1", "icu-2"})):
            armed = federation.restarted(fault=point)  # nothing but the enrolment writes there
            with pytest.raises(LinkError):
                armed.enrol("icu-2")
            assert armed.server.ends() == -signal.SIGKILL
            federation = armed.restarted()
            found = newest(federation, one)
            assert keys_of(found).keys() == enrolled, "a site and its key are kept together, or neither"
            assert (found == before) == (point == "store.commit")
            federation.server.signal(signal.SIGKILL)
        federation = federation.restarted()
        two = federation.enrol("icu-2")
        assert keys_of(newest(federation, one)) == own(one, two)


def test_a_renewal_keeps_the_key_and_a_directory_follows_it(alone: Federation) -> None:
    identity = alone.enrol("icu-1")
    before = newest(alone, identity)
    with channel(alone.address, identity) as opened:
        stub = services.FederationStub(opened)
        csr = make_csr(identity.key_pem)[1]
        assert stub.Renew(pb.EnrolRequest(csr=csr)).certificate
        other = application(identity.principal, csr)
        request = pb.EnrolRequest(csr=csr, identity_key=other["key"], identity_proof=other["proof"])
        status, details = status_of(lambda: stub.Renew(request))
    assert status == grpc.StatusCode.PERMISSION_DENIED
    assert "the one that it enrolled with" in details
    assert keys_of(newest(alone, identity)) == keys_of(before)


def test_a_restored_coordinator_signs_anew_for_sites_that_have_seen_more(alone: Federation) -> None:
    identity = alone.enrol("icu-1")
    before = newest(alone, identity)
    out = fedge_ok("server", "directory", "renew", alone.home / "server.toml")
    after = newest(alone, identity)
    assert f"epoch {after.epoch}, 1 sites" in out
    assert after.epoch > before.epoch
    assert after.statements == before.statements
    done = fedge(
        "server", "directory", "export", alone.home / "server.toml", "--out", alone.folder / "out.json"
    )
    assert done.returncode == 2
    assert "signs the directory by itself" in done.stderr


# With an authority apart.


@contextmanager
def apart(folder: Path) -> Iterator[Federation]:
    """A federation whose directory is signed in folder/vault."""
    fedge_ok("server", "directory", "authority", folder / "vault")
    public = folder / "vault" / "authority.pem"
    with coordinator(folder, directory={"authority": str(public)}) as started:
        yield started


def enrol_apart(federation: Federation, name: str) -> Identity:
    token = federation.authority.issue_token(name, now=now())
    return asyncio.run(
        enrol_site(
            federation.address,
            token,
            ca_pem=federation.authority.ca_pem,
            folder=federation.folder / name,
            authority_pem=(federation.folder / "vault" / "authority.pem").read_bytes(),
        )
    )


def exported(federation: Federation, name: str = "pending.json") -> Path:
    path = federation.folder / name
    fedge_ok("server", "directory", "export", federation.home / "server.toml", "--out", path)
    return path


def sign(federation: Federation, pending: Path, name: str, *more: str | Path, key: Path | None = None) -> str:
    key = key or federation.folder / "vault" / "authority.key"
    out = federation.folder / name
    return fedge_ok("server", "directory", "sign", pending, "--key", key, "--out", out, *more)


def imported(federation: Federation, path: Path) -> tuple[int, str]:
    done = fedge("server", "directory", "import", federation.home / "server.toml", path)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr or done.stdout


def test_an_authority_apart_is_the_only_one_that_says_whose_key_is_whose(tmp_path: Path) -> None:
    with apart(tmp_path) as federation:
        one = enrol_apart(federation, "icu-1")
        with pytest.raises(
            RunError, match="not signed yet: its operator has to run `fedge server directory export`"
        ):
            newest(federation, one)
        found = show(federation)
        assert (found["apart"], found["epoch"], found["sites"]) == (True, None, [])
        assert found["pending"]["added"] == ["icu-1"]
        said = fedge_ok("server", "directory", "show", federation.home / "server.toml")
        assert "not signed yet" in said

        first = exported(federation)
        said = sign(federation, first, "first.json", "--valid-days", "180")
        assert f"added     icu-1 {key_fingerprint(public_bytes(one.signing))}" in said
        assert imported(federation, tmp_path / "first.json")[0] == 0
        directory = newest(federation, one)
        assert keys_of(directory) == own(one)
        (statement,) = directory.statements
        assert statement.not_after > now().timestamp() + 179 * 86_400

        two = enrol_apart(federation, "icu-2")
        assert keys_of(newest(federation, one)) == own(one), "until it is signed"
        with pytest.raises(RefusedError, match="has no key of icu-2"):
            newest(federation, two)
        fedge_ok("site", "revoke", "icu-1", "--admin", federation.admin_toml)
        pending = show(federation)["pending"]
        assert (pending["added"], pending["removed"]) == (["icu-2"], ["icu-1"])
        said = sign(federation, exported(federation), "second.json", "--previous", tmp_path / "first.json")
        assert f"added     icu-2 {key_fingerprint(public_bytes(two.signing))}" in said
        assert f"removed   icu-1 {key_fingerprint(public_bytes(one.signing))}" in said
        assert imported(federation, tmp_path / "second.json")[0] == 0
        assert keys_of(newest(federation, two)) == own(two)

        renewed = enrol_apart(federation, "icu-2")
        said = sign(federation, exported(federation), "third.json", "--previous", tmp_path / "second.json")
        before, after = (key_fingerprint(public_bytes(each.signing)) for each in (two, renewed))
        assert f"new key   icu-2 {before} -> {after}" in said
        with pytest.raises(RefusedError, match="somebody else signs as this site, or it was enrolled anew"):
            newest(federation, renewed)
        restarted = federation.restarted() if federation.server.signal(signal.SIGTERM) == 0 else federation
        assert imported(restarted, tmp_path / "third.json")[0] == 0
        assert keys_of(newest(restarted, renewed)) == own(renewed)


def test_a_directory_that_should_not_be_imported_is_not(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with apart(tmp_path) as federation:
        enrol_apart(federation, "icu-1")
        pending = exported(federation)
        sign(federation, pending, "good.json")
        stranger = tmp_path / "stranger.key"
        stranger.touch(mode=0o600)
        stranger.write_bytes(key_to_pem(ec.generate_private_key(ec.SECP256R1())))
        sign(federation, pending, "forged.json", key=stranger)
        sign(federation, pending, "by-ca.json", key=federation.home / "ca.key")
        text = (tmp_path / "good.json").read_text()
        (tmp_path / "cut.json").write_text(text[: len(text) // 2])
        elsewhere = json.loads(pending.read_text()) | {"federation": "0" * 16}
        (tmp_path / "elsewhere.json").write_text(json.dumps(elsewhere))
        sign(federation, tmp_path / "elsewhere.json", "foreign.json")
        for name, code, message in (
            ("forged.json", 5, "has signed"),
            ("by-ca.json", 5, "has signed"),
            ("foreign.json", 5, "of federation"),
            ("cut.json", 2, "cut.json"),
            ("pending.json", 2, "expected a signed directory"),
            ("absent.json", 2, "found none"),
        ):
            found, said = imported(federation, tmp_path / name)
            assert found == code, said
            assert message in said
        assert show(federation)["epoch"] is None
        assert imported(federation, tmp_path / "good.json")[0] == 0
        found, said = imported(federation, tmp_path / "good.json")
        assert found == 5
        assert "expected an epoch after" in said


def test_the_machine_that_signs_needs_its_key_private_and_never_goes_back(tmp_path: Path) -> None:
    with apart(tmp_path) as federation:
        vault = tmp_path / "vault"
        assert fedge("server", "directory", "authority", vault).returncode == 5, "it is never overwritten"
        modes = {path.name: path.stat().st_mode & 0o777 for path in vault.iterdir()}
        assert modes == {"authority.key": 0o600, "authority.pem": 0o600}
        enrol_apart(federation, "icu-1")
        pending = exported(federation)
        sign(federation, pending, "first.json")

        def refused(*more: str | Path, file: Path = pending) -> tuple[int, str]:
            done = fedge(
                *("server", "directory", "sign", file, "--key", vault / "authority.key"),
                *("--out", tmp_path / "never.json", *more),
            )
            assert not (tmp_path / "never.json").exists()
            return done.returncode, done.stderr

        code, said = refused("--previous", tmp_path / "first.json")
        assert (code, "expected a directory of an epoch after" in said) == (5, True)
        code, said = refused("--previous", pending)
        assert (code, "expected a signed directory" in said) == (2, True)
        code, said = refused(file=tmp_path / "first.json")
        assert (code, "found a signed one" in said) == (2, True)
        assert refused("--valid-days", "0")[0] == 2
        (vault / "authority.key").chmod(0o644)
        code, said = refused()
        assert (code, "chmod 600" in said) == (5, True)


def test_a_coordinator_whose_authority_is_missing_or_no_key_does_not_start(alone: Federation) -> None:
    toml = alone.home / "server.toml"
    toml.write_text(toml.read_text() + '\n[directory]\nauthority = "authority.pem"\n')
    for text, code in ((None, 2), ("garbage", 5)):
        if text is not None:
            (alone.home / "authority.pem").write_text(text)
        done = fedge("server", "token", toml, "--site", "icu-1")
        assert done.returncode == code
        assert "authority.pem" in done.stderr


def test_a_site_that_enrols_again_keeps_its_authority_and_one_that_is_no_key_costs_no_token(
    tmp_path: Path,
) -> None:
    with apart(tmp_path) as federation:
        first = enrol_apart(federation, "icu-1")
        (tmp_path / "bad.pem").write_text("garbage")
        token = federation.authority.issue_token("icu-1", now=now())
        command = (
            *("client", "enrol", "--server", federation.address, "--token", token),
            *("--ca", federation.home / "ca.pem", "--dir", tmp_path / "icu-1"),
        )
        done = fedge(*command, "--authority", tmp_path / "bad.pem")
        assert done.returncode == 5
        assert "authority" in done.stderr
        fedge_ok(*command)
        again = load_identity(tmp_path / "icu-1", now=now())
        assert again.authority == first.authority != federation.authority.issuer.key.public_key()
