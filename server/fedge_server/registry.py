"""What the authority remembers, as files: enrolment tokens and the holders of certificates.

    <folder>/tokens/<serial>.pending|used|cancelled   one file per token, named by its bootstrap certificate
    <folder>/sites/<name>.json                        one record per enrolled site
    <folder>/admins/<name>.json                       one record per admin
    <folder>/tokens/.lock                             held by whoever changes any of these

Several processes work on one folder: the coordinator enrols while `fedge server token` writes. Changes
are made one at a time under the lock; a token is spent by one atomic rename that only one caller can win.
Reading takes no lock, since every record is replaced in one piece, and no cache, since a small file is
cheap beside the call that asks and is never stale. Who may do what is decided in identity.py, not here.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, TypeVar

from pydantic import ValidationError

from fedge.config import Config, nearest
from fedge.errors import ConfigError
from fedge.files import private_folder, read_capped, write_private
from fedge.principal import Principal, check_name

Kind = Literal["site", "admin"]
TokenState = Literal["pending", "used", "cancelled"]
R = TypeVar("R", bound=Config)

MAX_LIVE_CERTIFICATES: Final = 16
_MAX_RECORD_BYTES = 64 * 1024
_FOLDERS: Final[dict[Kind, str]] = {"site": "sites", "admin": "admins"}


class Holder(Config):
    """A site or admin, and the certificates it may use: serial (hexadecimal) -> end, last used last."""

    name: str
    serials: dict[str, datetime]
    enrolled_at: datetime
    revoked: bool = False


class PendingToken(Config):
    """A token that nobody has used yet. Its key is nowhere but in the token itself."""

    site: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Registry:
    """The records under one folder."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Registry:
        """The registry in `folder`, whose private subfolders are made if they are missing."""
        for name in ("tokens", *_FOLDERS.values()):
            private_folder(folder / name)
        return cls(folder)

    def add_token(self, token: Principal) -> None:
        """Remember a new bootstrap identity; the earlier unused tokens of its site are cancelled."""
        with self._changing():
            self._cancel_tokens(token.name)
            pending = PendingToken(site=token.name, expires_at=token.not_after)
            write_private(self._token(token, "pending"), pending.model_dump_json())

    def token_state(self, token: Principal) -> TokenState | None:
        """What became of a token; None if there never was one."""
        states: tuple[TokenState, ...] = ("pending", "used", "cancelled")
        return next((state for state in states if self._token(token, state).exists()), None)

    def enrol(self, token: Principal, site: Principal, *, now: datetime) -> bool:
        """Spend a token and make `site` the only certificate of its name. False if it was not pending.

        The token goes first: a crash in between wastes a token and never honours one twice.
        """
        with self._changing():
            try:
                self._token(token, "pending").rename(self._token(token, "used"))
            except FileNotFoundError:
                return False
            _sync(self.folder / "tokens")
            self._write_only("site", site, now=now)
            return True

    def add_admin(self, admin: Principal, *, now: datetime) -> None:
        """Make `admin` the only certificate of its name."""
        with self._changing():
            self._write_only("admin", admin, now=now)

    def renew(self, old: Principal, new: Principal, *, now: datetime) -> bool:
        """Add a site's certificate `new` beside its live ones. False if `old` is not one of them.

        At most 16 stay, the longest unused go first: a client that renews in a loop fills nothing, and
        cannot lose the certificate that it asks with.
        """
        with self._changing():
            holder = self.holder("site", old.name)
            asking = _hex(old.serial)
            if holder is None or holder.revoked or asking not in holder.serials:
                return False
            live = {serial: end for serial, end in holder.serials.items() if end >= now and serial != asking}
            live |= {asking: old.not_after, _hex(new.serial): new.not_after}
            serials = dict(list(live.items())[-MAX_LIVE_CERTIFICATES:])
            self._write("site", holder.model_copy(update={"serials": serials}))
            return True

    def revoke(self, kind: Kind, name: str) -> None:
        """Refuse this holder from now on, and cancel the tokens that could enrol it again.

        Raises:
            ConfigError: there is neither such a holder nor an unused token for it.
        """
        with self._changing():
            cancelled = kind == "site" and self._cancel_tokens(name)
            holder = self.holder(kind, name)
            if holder is not None:
                self._write(kind, holder.model_copy(update={"revoked": True}))
            elif not cancelled:
                known = nearest(name, [other.name for other in self.holders(kind)])
                raise ConfigError(f"expected an enrolled {kind}, found none named {name[:80]!r}; {known}")

    def accepts(self, kind: Kind, principal: Principal) -> bool:
        """Whether this certificate is one of its holder's, and the holder is not revoked."""
        holder = self.holder(kind, principal.name)
        return holder is not None and not holder.revoked and _hex(principal.serial) in holder.serials

    def holder(self, kind: Kind, name: str) -> Holder | None:
        """The record of one holder; None if it was never enrolled.

        Raises:
            ConfigError: the record is damaged.
        """
        path = self._holder(kind, name)
        return _read(path, Holder) if path.exists() else None

    def holders(self, kind: Kind) -> tuple[Holder, ...]:
        """All holders of a kind, revoked ones included, by name."""
        paths = sorted((self.folder / _FOLDERS[kind]).glob("[!.]*.json"))
        return tuple(_read(path, Holder) for path in paths)

    def _cancel_tokens(self, site: str) -> bool:
        found = False
        for path in (self.folder / "tokens").glob("[!.]*.pending"):
            if _read(path, PendingToken).site == site:
                path.rename(path.with_suffix(".cancelled"))
                found = True
        _sync(self.folder / "tokens")
        return found

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The lock, between processes and between threads; the kernel frees it if its holder dies."""
        path = self.folder / "tokens" / ".lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _write_only(self, kind: Kind, principal: Principal, *, now: datetime) -> None:
        serials = {_hex(principal.serial): principal.not_after}
        self._write(kind, Holder(name=principal.name, serials=serials, enrolled_at=now))

    def _write(self, kind: Kind, holder: Holder) -> None:
        write_private(self._holder(kind, holder.name), holder.model_dump_json(indent=2) + "\n")

    def _holder(self, kind: Kind, name: str) -> Path:
        return self.folder / _FOLDERS[kind] / f"{check_name(name, what=kind)}.json"

    def _token(self, token: Principal, state: TokenState) -> Path:
        return self.folder / "tokens" / f"{_hex(token.serial)}.{state}"


def _hex(serial: int) -> str:
    return f"{serial:040x}"


def _read(path: Path, kind: type[R]) -> R:
    try:
        return kind.model_validate_json(read_capped(path, max_bytes=_MAX_RECORD_BYTES))
    except ValidationError as error:
        raise ConfigError(f"{path}: damaged record: {error.errors()[0]['msg']}") from None


def _sync(folder: Path) -> None:
    """Make a rename in `folder` durable: a used token must stay used after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
