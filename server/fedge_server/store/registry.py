"""What the authority remembers: enrolment tokens, the holders of certificates, and the keys with which sites sign.

The coordinator enrols while `fedge server token` writes in another process: changes are made one at a
time, each in a transaction with the event that tells auditors of it. A token is spent by one update that
only one caller can win. Who may do what is decided in identity.py, not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, cast

import sqlalchemy as sa

from fedge.config import nearest
from fedge.errors import ConfigError
from fedge.principal import Principal, check_name
from fedge.secagg.directory import Directory
from fedge.signing import SignedDirectory
from fedge_server.store import directories
from fedge_server.store.database import Database
from fedge_server.store.directories import Signing
from fedge_server.store.events import add_event
from fedge_server.store.records import Event
from fedge_server.store.schema import certificates, holders, tokens, witnesses

Kind = Literal["site", "admin"]
TokenState = Literal["pending", "used", "cancelled"]

MAX_LIVE_CERTIFICATES: Final = 16


@dataclass(frozen=True, slots=True)
class Holder:
    """A site or admin, and the serials (hexadecimal) of the certificates it may use, last used last."""

    kind: Kind
    name: str
    serials: tuple[str, ...]
    enrolled_at: datetime
    revoked: bool = False

    def accepts(self, principal: Principal) -> bool:
        """Whether this certificate is one of the holder's, and the holder is not revoked."""
        return not self.revoked and _hex(principal.serial) in self.serials


class Registry:
    """The records, in a database that is open. Calls block, and raise StorageError if it cannot be used.

    A change with `signing` also signs the directory, in the same transaction, if the change is one to that.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_token(self, token: Principal, *, now: datetime) -> None:
        """Remember a new bootstrap identity; the earlier unused tokens of its site are cancelled."""
        with self._changing() as connection:
            self._cancel_tokens(connection, token.name)
            # An expired token is refused for that, whatever became of it.
            connection.execute(sa.delete(tokens).where(tokens.c.expires_at < now.timestamp()))
            connection.execute(
                sa.insert(tokens).values(
                    serial=_hex(token.serial),
                    site=token.name,
                    state="pending",
                    expires_at=token.not_after.timestamp(),
                )
            )
            _note(connection, now, "token_issued", token.name)

    def token_state(self, token: Principal) -> TokenState | None:
        """What became of a token; None if there never was one."""
        with self._database.reading() as connection:
            found = connection.execute(
                sa.select(tokens.c.state).where(tokens.c.serial == _hex(token.serial))
            ).scalar()
            return cast("TokenState | None", found)

    def enrol(
        self, token: Principal, site: Principal, *, key: bytes, now: datetime, signing: Signing | None = None
    ) -> bool:
        """Spend a token and make `site` the only certificate of its name, and `key` that with which it signs.
        False if the token was not pending.

        Raises:
            IdentityError: the key is another site's.
        """
        with self._changing() as connection:
            spent = connection.execute(
                sa.update(tokens)
                .where(tokens.c.serial == _hex(token.serial), tokens.c.state == "pending")
                .values(state="used")
            )
            if spent.rowcount != 1:
                return False
            self._write_only(connection, "site", site, now=now)
            directories.set_key(connection, site, key)
            _note(connection, now, "site_enrolled", site.name, detail=f"certificate {_hex(site.serial)}")
            directories.sign_if_changed(connection, signing, now=now)
            return True

    def add_admin(self, admin: Principal, *, now: datetime) -> None:
        """Make `admin` the only certificate of its name."""
        with self._changing() as connection:
            self._write_only(connection, "admin", admin, now=now)
            _note(connection, now, "admin_issued", admin.name, detail=f"certificate {_hex(admin.serial)}")

    def renew(
        self,
        old: Principal,
        new: Principal,
        *,
        key: bytes = b"",
        now: datetime,
        signing: Signing | None = None,
    ) -> bool:
        """Add a site's certificate `new` beside its live ones. False if `old` is not one of them.

        At most 16 stay, the longest unused go first: a client that renews in a loop fills nothing, and
        cannot lose the certificate that it asks with.

        Raises:
            IdentityError: there is a `key`, and it is not the one that the site enrolled with.
        """
        with self._changing() as connection:
            holder = self._holder(connection, "site", old.name)
            if holder is None or not holder.accepts(old):
                return False
            self._live(connection, now)
            asking, fresh = _hex(old.serial), _hex(new.serial)
            others = [serial for serial in holder.serials if serial != asking]
            kept = [*others, asking, fresh][-MAX_LIVE_CERTIFICATES:]
            table = certificates
            connection.execute(
                sa.delete(table).where(
                    table.c.kind == "site", table.c.name == old.name, table.c.serial.not_in(kept)
                )
            )
            newest = connection.execute(sa.select(sa.func.max(table.c.used))).scalar() or 0
            connection.execute(sa.update(table).where(table.c.serial == asking).values(used=newest + 1))
            self._add_certificate(connection, "site", new, used=newest + 2)
            directories.extend_key(connection, new, key)
            _note(connection, now, "site_renewed", old.name, detail=f"certificate {fresh}")
            directories.sign_if_changed(connection, signing, now=now)
            return True

    def revoke(
        self, kind: Kind, name: str, *, now: datetime, actor: str = "", signing: Signing | None = None
    ) -> None:
        """Refuse this holder from now on, and cancel the tokens that could enrol it again.

        Raises:
            ConfigError: there is neither such a holder nor an unused token for it.
        """
        check_name(name, what=kind)
        with self._changing() as connection:
            cancelled = kind == "site" and self._cancel_tokens(connection, name)
            found = connection.execute(
                sa.update(holders).where(holders.c.kind == kind, holders.c.name == name).values(revoked=True)
            )
            if not found.rowcount and not cancelled:
                names = connection.execute(sa.select(holders.c.name).where(holders.c.kind == kind))
                known = nearest(name, list(names.scalars()))
                raise ConfigError(f"expected an enrolled {kind}, found none named {name[:80]!r}; {known}")
            _note(connection, now, f"{kind}_revoked", name, actor=actor)
            directories.sign_if_changed(connection, signing, now=now)

    def sign(self, signing: Signing, *, now: datetime, anew: bool = False) -> None:
        """Sign the directory if the newest one is not of what is active and under this key; `anew`, in any case."""
        with self._changing("directory") as connection:
            directories.sign_if_changed(connection, signing, now=now, anew=anew)

    def keep_directory(self, signed: SignedDirectory, *, now: datetime) -> None:
        """Keep a directory that was signed elsewhere as the newest one.

        Raises:
            IdentityError: its epoch is not beyond the newest one's.
        """
        with self._changing() as connection:
            directories.put(connection, signed, now=now)

    def directory(self, federation: str) -> SignedDirectory | None:
        """The newest signed directory, whoever has signed it; None if there never was one."""
        with self._database.reading() as connection:
            return directories.newest(connection, federation)

    def directory_epoch(self) -> int:
        """The newest signed directory's epoch; 0 if there is none."""
        with self._database.reading() as connection:
            return directories.newest_epoch(connection)

    def pending_directory(self, federation: str, *, now: datetime) -> Directory:
        """The directory that would be signed now, of what is active."""
        with self._database.reading() as connection:
            epoch = directories.next_epoch(connection, now=now)
            return Directory.of(federation, epoch, directories.active(connection))

    def holder(self, kind: Kind, name: str) -> Holder | None:
        """The record of one holder; None if it was never enrolled."""
        with self._database.reading() as connection:
            return self._holder(connection, kind, name)

    def holders(self, kind: Kind) -> tuple[Holder, ...]:
        """All holders of a kind, revoked ones included, by name."""
        with self._database.reading() as connection:
            serials: dict[str, list[str]] = {}
            for row in connection.execute(
                sa.select(certificates).where(certificates.c.kind == kind).order_by(certificates.c.used)
            ):
                serials.setdefault(row.name, []).append(row.serial)
            found = connection.execute(
                sa.select(holders).where(holders.c.kind == kind).order_by(holders.c.name)
            )
            return tuple(_holder_of(row, serials.get(row.name, [])) for row in found)

    def witness(self, site: str) -> bytes:
        """What a site had kept last of its ledger; empty if nothing."""
        with self._database.reading() as connection:
            found = connection.execute(sa.select(witnesses.c.sealed).where(witnesses.c.site == site)).scalar()
            return bytes(found) if found is not None else b""

    def keep_witnesses(self, sealed: Mapping[str, bytes]) -> None:
        """Keep these, each instead of its site's last one."""
        with self._database.writing("witness") as connection:
            connection.execute(sa.delete(witnesses).where(witnesses.c.site.in_(list(sealed))))
            rows = [{"site": site, "sealed": value} for site, value in sealed.items()]
            connection.execute(sa.insert(witnesses), rows)

    @contextmanager
    def _changing(self, what: str = "store") -> Iterator[sa.Connection]:
        """A transaction that no other change to these records runs beside, in any process."""
        with self._database.writing(what) as connection:
            self._database.exclude(connection)
            yield connection

    def _holder(self, connection: sa.Connection, kind: Kind, name: str) -> Holder | None:
        found = connection.execute(
            sa.select(holders).where(holders.c.kind == kind, holders.c.name == name)
        ).first()
        if found is None:
            return None
        serials = connection.execute(
            sa.select(certificates.c.serial)
            .where(certificates.c.kind == kind, certificates.c.name == name)
            .order_by(certificates.c.used)
        )
        return _holder_of(found, list(serials.scalars()))

    def _cancel_tokens(self, connection: sa.Connection, site: str) -> bool:
        cancelled = connection.execute(
            sa.update(tokens)
            .where(tokens.c.site == site, tokens.c.state == "pending")
            .values(state="cancelled")
        )
        return cancelled.rowcount > 0

    def _write_only(
        self, connection: sa.Connection, kind: Kind, principal: Principal, *, now: datetime
    ) -> None:
        name = check_name(principal.name, what=kind)
        connection.execute(sa.delete(holders).where(holders.c.kind == kind, holders.c.name == name))
        connection.execute(
            sa.insert(holders).values(kind=kind, name=name, enrolled_at=now.timestamp(), revoked=False)
        )
        self._live(connection, now)
        newest = connection.execute(sa.select(sa.func.max(certificates.c.used))).scalar() or 0
        self._add_certificate(connection, kind, principal, used=newest + 1)

    def _live(self, connection: sa.Connection, now: datetime) -> None:
        """Drop certificates that have expired: they are refused for that."""
        connection.execute(sa.delete(certificates).where(certificates.c.expires_at < now.timestamp()))

    def _add_certificate(
        self, connection: sa.Connection, kind: Kind, principal: Principal, *, used: int
    ) -> None:
        connection.execute(
            sa.insert(certificates).values(
                serial=_hex(principal.serial),
                kind=kind,
                name=principal.name,
                expires_at=principal.not_after.timestamp(),
                used=used,
            )
        )


def _holder_of(row: sa.Row[tuple[object, ...]], serials: list[str]) -> Holder:
    enrolled_at = datetime.fromtimestamp(row.enrolled_at, UTC)
    return Holder(row.kind, row.name, tuple(serials), enrolled_at, bool(row.revoked))


def _note(
    connection: sa.Connection, now: datetime, kind: str, subject: str, *, actor: str = "", detail: str = ""
) -> None:
    add_event(connection, Event(now.timestamp(), kind, subject, actor, detail))


def _hex(serial: int) -> str:
    return f"{serial:040x}"
