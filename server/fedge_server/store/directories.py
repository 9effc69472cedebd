"""Identity keys and the newest signed directory of them, as steps of a transaction that the registry has begun.

The directory is signed in the transaction of the change that it tells of, and only one such transaction runs at a
time: what is on disk is either both or neither, and no epoch is ever given to two directories. Epochs follow the
clock where they can, so that they grow even past those that a database put back to an earlier day has forgotten.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import IdentityError
from fedge.principal import Principal
from fedge.secagg.directory import Directory, Statement
from fedge.signing import SignedDirectory, key_fingerprint
from fedge_server.store.events import add_event
from fedge_server.store.records import Event
from fedge_server.store.schema import directories, holders, identity_keys


@dataclass(frozen=True, slots=True)
class Signing:
    """With what a coordinator signs the directory of its federation by itself."""

    federation: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)


def set_key(connection: sa.Connection, certificate: Principal, key: bytes) -> None:
    """Make `key` the one of a site that has just enrolled, for as long as its certificate is valid.

    Raises:
        IdentityError: it is another site's.
    """
    other = connection.execute(
        sa.select(identity_keys.c.site).where(
            identity_keys.c.key == key, identity_keys.c.site != certificate.name
        )
    ).scalar()
    if other is not None:
        raise IdentityError(
            f"identity key {key_fingerprint(key)}: expected a new one, found one that is another site's already: "
            "enrol with a key of this site's own"
        )
    connection.execute(sa.delete(identity_keys).where(identity_keys.c.site == certificate.name))
    connection.execute(
        sa.insert(identity_keys).values(site=certificate.name, key=key, **_validity(certificate))
    )


def extend_key(connection: sa.Connection, certificate: Principal, key: bytes) -> None:
    """Let a site's key be valid as long as its new certificate. `key` is empty, or the one that is known.

    Raises:
        IdentityError: it is another one, or the site has none.
    """
    site = identity_keys.c.site == certificate.name
    known = connection.execute(sa.select(identity_keys.c.key).where(site)).scalar()
    if key and key != known:
        raise IdentityError(
            f"identity key of site {certificate.name!r}: expected the one that it enrolled with, found another: "
            "a renewal keeps the key; enrol again to change it"
        )
    connection.execute(sa.update(identity_keys).where(site).values(**_validity(certificate)))


def active(connection: sa.Connection) -> tuple[Statement, ...]:
    """What a directory has to say now: a statement for each site that is enrolled, not revoked and has a key."""
    table = identity_keys.c
    found = connection.execute(
        sa.select(table.site, table.key, table.not_before, table.not_after)
        .join(holders, sa.and_(holders.c.kind == "site", holders.c.name == table.site))
        .where(sa.not_(holders.c.revoked))
    )
    return tuple(sorted(Statement(site, bytes(key), start, end) for site, key, start, end in found))


def newest(connection: sa.Connection, federation: str) -> SignedDirectory | None:
    """The newest signed directory as it is kept: whose signature it is, is for others to check."""
    row = connection.execute(sa.select(directories).order_by(directories.c.epoch.desc()).limit(1)).first()
    if row is None:
        return None
    statements = (
        Statement(site, bytes.fromhex(key), start, end)
        for site, key, start, end in json.loads(row.statements)
    )
    return SignedDirectory(Directory.of(federation, row.epoch, statements), bytes(row.signature))


def newest_epoch(connection: sa.Connection) -> int:
    """The epoch of the newest signed directory; 0 if there is none."""
    return connection.execute(sa.select(sa.func.max(directories.c.epoch))).scalar() or 0


def next_epoch(connection: sa.Connection, *, now: datetime) -> int:
    """The epoch that the next directory has."""
    return max(newest_epoch(connection) + 1, int(now.timestamp()))


def sign_if_changed(
    connection: sa.Connection, signing: Signing | None, *, now: datetime, anew: bool = False
) -> None:
    """Sign a directory of what is active, unless the newest one says it, under this key; `anew`, in any case.

    Without `signing` this is not the coordinator's to do: somebody signs elsewhere.
    """
    if signing is None:
        return
    statements = active(connection)
    if not anew and _is_said(connection, signing, statements):
        return
    directory = Directory.of(signing.federation, next_epoch(connection, now=now), statements)
    put(connection, SignedDirectory(directory, directory.sign(signing.key)), now=now)


def put(connection: sa.Connection, signed: SignedDirectory, *, now: datetime) -> None:
    """Keep a directory as the newest one, and tell auditors.

    Raises:
        IdentityError: its epoch is not beyond the newest one's.
    """
    directory, known = signed.directory, newest_epoch(connection)
    if directory.epoch <= known:
        raise IdentityError(
            f"directory of sites: expected an epoch after {known}, found {directory.epoch}: export the pending one, "
            "and have that signed"
        )
    connection.execute(sa.delete(directories))
    connection.execute(
        sa.insert(directories).values(
            epoch=directory.epoch,
            signed_at=now.timestamp(),
            statements=_text(directory.statements),
            signature=signed.signature,
        )
    )
    detail = f"{len(directory.statements)} sites, SHA-256 {directory.digest.hex()}"
    add_event(connection, Event(now.timestamp(), "directory_signed", f"epoch {directory.epoch}", "", detail))


def _is_said(connection: sa.Connection, signing: Signing, statements: tuple[Statement, ...]) -> bool:
    text = connection.execute(
        sa.select(directories.c.statements).order_by(directories.c.epoch.desc()).limit(1)
    ).scalar()
    if text != _text(statements):
        return False
    last = newest(connection, signing.federation)
    assert last is not None  # its statements have just been read
    return is_signed(last, signing.key.public_key())


def is_signed(signed: SignedDirectory, authority: ec.EllipticCurvePublicKey) -> bool:
    """Whether a directory that is kept here has been signed by this authority."""
    directory = signed.directory
    try:
        directory.check(signed.signature, authority, federation=directory.federation, now_s=0.0)
    except IdentityError:
        return False
    return True


def _text(statements: tuple[Statement, ...]) -> str:
    return json.dumps([[each.site, each.key.hex(), each.not_before, each.not_after] for each in statements])


def _validity(certificate: Principal) -> dict[str, int]:
    return {
        "not_before": int(certificate.not_before.timestamp()),
        "not_after": int(certificate.not_after.timestamp()),
    }
