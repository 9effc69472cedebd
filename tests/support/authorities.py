"""Authorities for tests: a CA's folder with its records in a SQLite file beside it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.errors import IdentityError
from fedge.principal import Principal
from fedge.signing import make_signing_key, prove, public_bytes, signing_key_of_pem
from fedge_client.identity import Identity, accept_certificate, make_csr, open_token
from fedge_server.identity import DAY_S, Authority, Credential
from fedge_server.store.database import Database
from fedge_server.store.registry import Registry


def new_authority(folder: Path, *, hosts: Iterable[str] = (), now: datetime) -> tuple[Authority, Credential]:
    """A new federation in `folder`, as `fedge server init` makes one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(f"sqlite:///{folder / 'fedge.db'}")
    database.open()
    return Authority.create(folder, Registry(database), hosts=hosts, now=now)


def load_authority(folder: Path) -> Authority:
    """The same authority as another process beside the coordinator's has it."""
    database = Database(f"sqlite:///{folder / 'fedge.db'}")
    database.join()
    return Authority.load(folder, Registry(database))


def is_refused(authority: Authority, principal: Principal, *, now: datetime) -> bool:
    """Whether a certificate does not count (any more)."""
    try:
        authority.check(principal, now=now)
    except IdentityError:
        return True
    return False


def application(token: Principal, csr_der: bytes, key: Ed25519PrivateKey | None = None) -> dict[str, bytes]:
    """The key and the proof that go with a request, by a new key unless one is given."""
    key = key or Ed25519PrivateKey.generate()
    proof = prove(key, federation=token.federation, site=token.name, csr_der=csr_der)
    return {"key": public_bytes(key), "proof": proof}


def enrol(
    authority: Authority,
    token: Principal,
    csr_der: bytes,
    *,
    now: datetime,
    key: Ed25519PrivateKey | None = None,
    valid_for_s: float = 90 * DAY_S,
) -> bytes:
    """Enrol as a site does, with a key that it signs with and a proof of it."""
    return authority.enrol(
        token, csr_der, **application(token, csr_der, key), now=now, valid_for_s=valid_for_s
    )


def enrolled(authority: Authority, site: str, *, now: datetime) -> Identity:
    """The identity of a site that enrols."""
    token = open_token(authority.issue_token(site, now=now), ca_pem=authority.ca_pem, now=now)
    key_pem, csr = make_csr()
    signing_pem = make_signing_key()
    proven = application(token.principal, csr, signing_key_of_pem(signing_pem))
    return accept_certificate(
        authority.enrol(token.principal, csr, **proven, now=now),
        key_pem=key_pem,
        signing_pem=signing_pem,
        ca_pem=authority.ca_pem,
        site=site,
        now=now,
    )
