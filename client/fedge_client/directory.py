"""What a site knows of the directory of keys: the newest one that it has seen, in a file beside its own keys.

The coordinator hands the directory on. It cannot change it without the authority's key, but it could show an old
one, on which somebody is active who is not any more, or two sites two different ones of one epoch. So what was seen
is on disk before it is used, and nothing older, and no other of the same epoch, is ever used after it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn, Protocol

from google.protobuf.message import DecodeError

from fedge.errors import ConfigError, IdentityError, RefusedError, RemoteProtocolError
from fedge.files import read_capped, write_private
from fedge.refusal import Refusal, RefusalCode
from fedge.secagg.directory import Directory
from fedge.signing import SignedDirectory, key_fingerprint, public_bytes
from fedge.wire import fedge_pb2 as pb
from fedge.wire.keys import decode_directory, encode_directory
from fedge.wire.limits import MAX_MESSAGE_BYTES
from fedge_client.identity import Identity

_FILE: Final = "directory.bin"


class Source(Protocol):
    """Where directories come from: a `Link`."""

    async def keys(self) -> pb.Directory: ...


class KnownDirectory:
    """The newest directory that this site has seen. Belongs to the event loop's thread.

    **Guarantees.** What `at` returns is signed by the authority, is not older than anything that it has returned
    before, in this process or an earlier one, is the only one of its epoch that it ever returns, and has this site's
    own key under its name.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        kept: SignedDirectory | None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._identity = identity
        self._own = public_bytes(identity.signing)
        self._authority = identity.authority
        self._clock = clock
        self._turn = asyncio.Lock()
        self._seen = (kept.directory.epoch, kept.directory.digest) if kept is not None else (0, b"")
        self._kept = kept
        """What is on disk. It counts for `_seen` whoever has signed it, and is checked again before it is used."""

    @classmethod
    def open(
        cls, folder: Path, identity: Identity, *, clock: Callable[[], float] = time.time
    ) -> KnownDirectory:
        """What was seen last, as it is remembered in the identity's folder. Another federation's does not count.

        Raises:
            IdentityError: the file is damaged. To go on without it would be to accept any old directory.
        """
        path = folder / _FILE
        kept = _read(path) if path.exists() else None
        if kept is not None and kept.directory.federation != identity.federation:
            kept = None
        return cls(path, identity, kept, clock=clock)

    @property
    def epoch(self) -> int:
        """Of the newest directory that was seen; 0 if none was."""
        return self._seen[0]

    async def at(self, epoch: int, link: Source) -> Directory:
        """The directory of this epoch, with the statements that are valid now; fetched if it is not the one known.

        Raises:
            RefusedError: ROSTER_INVALID; a later one was seen, the coordinator serves another epoch, or what it serves
                is not signed by the authority, is not what was seen, or has not this site's key under its name.
            RemoteProtocolError: what it serves is malformed.
            RunError: it has none yet.
            LinkError: it cannot be reached.
            StorageError: the directory cannot be remembered, and so is not used.
        """
        async with self._turn:
            if epoch < self._seen[0]:
                _refuse(
                    f"expected keys of epoch {self._seen[0]} or later, which were seen, found epoch {epoch}"
                )
            known = self._still_good() if self._seen[0] == epoch else None
            if known is None:
                known = await self._fetch(link)
            if known.epoch != epoch:
                _refuse(
                    f"expected the keys of epoch {epoch}, found a coordinator that serves epoch {known.epoch}"
                )
            self._check_own(known)
            return known

    def _still_good(self) -> Directory | None:
        """What is on disk, if this site's authority has signed it: that may be another one now."""
        if self._kept is None:
            return None
        try:
            return self._check(self._kept)
        except IdentityError:
            return None

    async def _fetch(self, link: Source) -> Directory:
        signed = decode_directory(await link.keys())
        try:
            checked = self._check(signed)
        except IdentityError as error:
            _refuse(str(error))
        # Seen from here on, even if it cannot be written or the task is cancelled while it is.
        self._seen = (signed.directory.epoch, signed.directory.digest)
        self._kept = None
        data = encode_directory(signed).SerializeToString()
        await asyncio.to_thread(write_private, self._path, data)
        self._kept = signed
        return checked

    def _check(self, signed: SignedDirectory) -> Directory:
        return signed.directory.check(
            signed.signature,
            self._authority,
            federation=self._identity.federation,
            seen=self._seen,
            now_s=self._clock(),
        )

    def _check_own(self, directory: Directory) -> None:
        """A site that is not on it cannot take part; one that is on it with another's key is being impersonated."""
        key, site = directory.key(self._identity.site), self._identity.site
        if key is None:
            _refuse(
                f"epoch {directory.epoch} of the directory of sites has no key of {site} that is valid now: the "
                "coordinator's operator has to have it signed anew"
            )
        if key != self._own:
            _refuse(
                f"epoch {directory.epoch} of the directory of sites has for {site} the key {key_fingerprint(key)}, "
                f"where this site's own is {key_fingerprint(self._own)}: somebody else signs as this site, or it was "
                "enrolled anew and the directory was not signed since"
            )


def _read(path: Path) -> SignedDirectory:
    try:
        return decode_directory(pb.Directory.FromString(read_capped(path, max_bytes=MAX_MESSAGE_BYTES)))
    except (ConfigError, DecodeError, RemoteProtocolError):
        raise IdentityError(
            f"{path}: expected the newest directory of sites that was seen, found a damaged file: put it back from a "
            "copy, or remove it if you trust the coordinator to show the newest one"
        ) from None


def _refuse(message: str) -> NoReturn:
    raise RefusedError(Refusal(RefusalCode.ROSTER_INVALID, message))
