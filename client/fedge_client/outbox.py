"""Updates that are ready to leave, on disk: an agent that starts again hands in the very bytes it had prepared.

    <folder>/<hash of the run's id>.update    its latest update's description, and the vector if it is small
    <folder>/<hash of the run's id>.vector    a large one

Only what the gate has released is here. Nothing is synced: a crash of the process loses nothing that was
written, a loss of power may. What is lost is found out by its digest, and said.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fedge.errors import RemoteProtocolError, StorageError
from fedge.events import OrderId
from fedge.files import private_folder
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_order_id
from fedge.wire.limits import INLINE_BYTES

_UPDATE: Final = ".update"
_VECTOR: Final = ".vector"
_HEADER: Final = struct.Struct("<III")
_MAX_BYTES: Final = INLINE_BYTES + (64 << 10)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An update as it will be sent: its message, and its vector's bytes (which a small one carries inline).

    It answers `order` on the model of this digest, and no other: a coordinator that has lost its last
    rounds may give an order of the same name again, on another model. `terms` is the digest of what was asked
    for the run when it was made.
    """

    order: OrderId
    model: bytes
    terms: bytes
    update: pb.Update
    data: memoryview

    def answers(self, order: OrderId, model: bytes) -> bool:
        return (self.order, self.model) == (order, model)


@dataclass(frozen=True, slots=True)
class Lost:
    """An update that was prepared, and may have been sent in part; its bytes are not here any more.

    Work that gives the bytes of this `digest` again makes it good. What is not known is None or empty.
    """

    order: OrderId | None
    model: bytes
    digest: bytes
    why: str

    def answers(self, order: OrderId, model: bytes) -> bool:
        return self.order is None or (self.order, self.model) == (order, model)

    @property
    def refusal(self) -> Refusal:
        return Refusal(
            RefusalCode.UPDATE_LOST, f"this site had prepared an update and has lost it: {self.why}"
        )


class Outbox:
    """A folder of prepared updates, one for each of the last `max_runs` runs.

    `write` of a large one may be called on any thread.
    """

    def __init__(self, folder: Path, *, max_runs: int) -> None:
        self._folder = private_folder(folder)
        self._max_runs = max_runs

    def announce(self, prepared: Prepared) -> None:
        """Remember that this update exists, before a byte of it can leave; a small one is then here whole.

        Raises:
            StorageError: the folder cannot be written.
        """
        data = prepared.update.SerializeToString()
        path = self._path(prepared.update.run_id, _UPDATE)
        temporary = path.with_suffix(".new")
        with _errors(path):
            header = _HEADER.pack(len(data), len(prepared.model), len(prepared.terms))
            _write(temporary, header + data + prepared.model + prepared.terms)
            temporary.replace(path)
            self._make_room()

    def write(self, prepared: Prepared) -> None:
        """Keep a large update's vector, too.

        Raises:
            StorageError: the folder cannot be written.
        """
        path = self._path(prepared.update.run_id, _VECTOR)
        with _errors(path):
            _write(path, prepared.data)

    def read(self, run_id: str, *, terms: bytes) -> Prepared | Lost | None:
        """The update that was prepared last for a run under these terms; None if there was none.

        One that was made under others is forgotten: it may be less protected than what was agreed since.
        """
        try:
            with self._path(run_id, _UPDATE).open("rb") as file:
                data = file.read(_MAX_BYTES)
            length, digest_length, terms_length = _HEADER.unpack_from(data)
            end = _HEADER.size + length
            update, rest = pb.Update.FromString(data[_HEADER.size : end]), data[end:]
            model, agreed = rest[:digest_length], rest[digest_length:]
            order = decode_order_id(update.id)
        except FileNotFoundError:
            return None
        except (OSError, struct.error, DecodeError, RemoteProtocolError):
            return Lost(None, b"", b"", "its description cannot be read")
        if len(rest) == digest_length + terms_length and agreed != terms:
            self.forget(run_id)
            return None
        if agreed != terms or update.run_id != run_id:
            return Lost(None, b"", b"", "its description is cut off")
        vector = memoryview(self._vector(run_id, update))
        if len(vector) != update.vector.size or digest_of(vector) != update.vector.digest:
            return Lost(order, model, update.vector.digest, f"the vector for the {order} is incomplete")
        return Prepared(order, model, agreed, update, vector)

    def forget(self, run_id: str) -> None:
        """The run is over, or its update is not wanted any more."""
        for suffix in (_UPDATE, _VECTOR):
            with suppress(OSError):
                self._path(run_id, suffix).unlink()

    def _make_room(self) -> None:
        """Forget runs that ended while nobody told this site: those that were answered longest ago."""
        answered = sorted(self._folder.glob(f"*{_UPDATE}"), key=lambda path: path.stat().st_mtime_ns)
        for path in answered[: -self._max_runs]:
            for suffix in (_UPDATE, _VECTOR):
                path.with_suffix(suffix).unlink(missing_ok=True)

    def _vector(self, run_id: str, update: pb.Update) -> bytes:
        if update.vector.HasField("inline"):
            return update.vector.inline
        if not update.vector.size:
            return b""
        try:
            with self._path(run_id, _VECTOR).open("rb") as file:
                return file.read(update.vector.size + 1)
        except OSError:
            return b""

    def _path(self, run_id: str, suffix: str) -> Path:
        return self._folder / f"{_stem(run_id)}{suffix}"


def _stem(run_id: str) -> str:
    """A file's name for whatever a coordinator calls a run."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:32]


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: an update cannot be kept: {error.strerror}") from None


def _write(path: Path, data: bytes | memoryview) -> None:
    """Over what is there: its pages are in memory already, and the digest tells a mixture from the whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.truncate()
