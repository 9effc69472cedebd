"""What a site keeps of an app on disk: each node's states, and the replies that have not left yet.

    <folder>/<hash of the run's id>/<node>.<number>.state    after its message of that number, whose id is in it
    <folder>/<hash of the run's id>/<node>.<number>.reply    of one that did not leave at once

A state is on disk before the reply can leave; the one before it stays until the reply is where it is wanted. So a
process that is killed loses no more than a reply, and a message that comes again then is dealt with from the state that
it was dealt with before. Nothing is synced: a crash of the process loses nothing that was written, a loss of power may.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fedge.errors import RemoteProtocolError, StorageError
from fedge.files import private_folder
from fedge.records import AppError, Buffer
from fedge.wire import fedge_pb2 as pb
from fedge.wire.records import Packed, decode, encode

MAX_RUNS: Final = 16
"""Runs whose end nobody has told this site, the newest of which are kept."""

MAX_TURNS: Final = 128
"""Of a node: more than a coordinator gives a site messages at once."""

_STATE, _REPLY = ".state", ".reply"
_SIZES: Final = struct.Struct("<4sIQ")
_MAGIC: Final = b"fgk1"


@dataclass(slots=True, eq=False)
class _Turn:
    """What a node has done with one message. `reply` is in memory; if it is not, it may be `stored`."""

    number: int
    id: str
    reply: Packed | None = None
    stored: bool = False


class States:
    """One app's run. Made anew, it has what an earlier process kept. For any thread, one at a time for each node."""

    def __init__(self, folder: Path, run_id: str, *, in_use: Collection[str] = ()) -> None:
        """`in_use` are other runs, whose states stay.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._folder = private_folder(private_folder(folder) / _stem(run_id))
        self._lock = threading.Lock()
        self._turns: dict[int, list[_Turn]] = {}
        """Of each node, oldest first: those whose replies are not where they are wanted, and the last."""
        self._newest: dict[int, memoryview] = {}
        for path in sorted(self._folder.glob(f"*{_STATE}"), key=_number_of):
            self._find(path)
        _forget_others(folder, {_stem(run_id), *map(_stem, in_use)})

    @property
    def ids(self) -> list[str]:
        """The messages whose replies are here."""
        with self._lock:
            return [turn.id for _, turn in self._all() if turn.reply is not None or turn.stored]

    def state(self, node: int) -> Sequence[Buffer]:
        """As records are packed; nothing for a node that has none yet."""
        with self._lock:
            return (self._newest[node],) if node in self._newest else ()

    def keep(self, node: int, reply: Packed, state: memoryview) -> None:
        """Keep a node's state, and the reply that it was made with in memory.

        Raises:
            StorageError: it cannot be written; what was kept before stands.
        """
        with self._lock:
            turns = self._turns.setdefault(node, [])
            turn = _Turn(turns[-1].number + 1 if turns else 1, reply.about.reply_to, reply)
            self._write(self._path(node, turn, _STATE), turn.id.encode(), (state,))
            self._newest[node] = state
            turns.append(turn)
            self._clean(node)

    def store(self, ids: Iterable[str] | None = None) -> None:
        """Keep these replies, or all, on disk, and no longer in memory.

        Raises:
            StorageError: one cannot be written.
        """
        wanted = None if ids is None else set(ids)
        with self._lock:
            found = [
                (node, turn, turn.reply)
                for node, turn in self._all()
                if turn.reply is not None and (wanted is None or turn.id in wanted)
            ]
        for node, turn, reply in found:  # which takes long, and nobody is to wait for it
            path = self._path(node, turn, _REPLY)
            self._write(path, encode(reply.about).SerializeToString(), reply.payload)
            with self._lock:
                if turn.reply is reply:
                    turn.reply, turn.stored = None, True
                else:
                    path.unlink(missing_ok=True)

    def reply(self, id: str) -> Packed | None:
        """The reply to a message, if it is here."""
        with self._lock:
            for node, turn in self._all():
                if turn.id == id:
                    return turn.reply or (_reply_in(self._path(node, turn, _REPLY)) if turn.stored else None)
        return None

    def forget(self, id: str) -> None:
        """The reply to a message is where it is wanted, or is not wanted any more."""
        with self._lock:
            for node, turn in self._all():
                if turn.id == id:
                    turn.id, turn.reply = "", None
                    if turn.stored:
                        self._path(node, turn, _REPLY).unlink(missing_ok=True)
                        turn.stored = False
                    self._clean(node)

    def rewind(self, node: int, id: str) -> None:
        """A message comes again whose reply was lost: the node is as it was before it."""
        with self._lock:
            turns = self._turns.get(node, [])
            at = next((at for at, turn in enumerate(turns) if turn.id == id), None)
            if at is None:
                return
            for turn in turns[at:]:
                self._remove(node, turn)
            first, self._turns[node] = turns[at].number, turns[:at]
            before = _Turn(first - 1, "")
            found = _read(self._path(node, before, _STATE)) if first > 1 else None
            self._newest.pop(node, None)
            if found is not None:
                self._newest[node] = found[1]
                self._turns[node] = turns[:at] or [before]

    def close(self) -> None:
        """The run is over."""
        with self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _all(self) -> list[tuple[int, _Turn]]:
        return [(node, turn) for node, turns in self._turns.items() for turn in turns]

    def _find(self, path: Path) -> None:
        """What an earlier process has kept of a turn."""
        node, _, number = path.name.removesuffix(_STATE).partition(".")
        found = _read(path) if node.isdigit() and number.isdigit() else None
        if found is None:
            return
        turn = _Turn(int(number), found[0].decode(errors="replace"))
        turn.stored = _reply_in(self._path(int(node), turn, _REPLY)) is not None
        self._turns.setdefault(int(node), []).append(turn)
        self._newest[int(node)] = found[1]

    def _clean(self, node: int) -> None:
        """Turns that nobody will come back to go; the state before one whose reply may be wanted again stays."""
        turns = self._turns[node]
        while len(turns) > MAX_TURNS or (len(turns) > 1 and not turns[0].id and not turns[1].id):
            self._remove(node, turns.pop(0))

    def _remove(self, node: int, turn: _Turn) -> None:
        for suffix in (_STATE, _REPLY):
            self._path(node, turn, suffix).unlink(missing_ok=True)

    def _path(self, node: int, turn: _Turn, suffix: str) -> Path:
        return self._folder / f"{node}.{turn.number}{suffix}"

    def _write(self, path: Path, header: bytes, parts: Sequence[Buffer]) -> None:
        """In one piece, or not at all."""
        temporary = path.with_suffix(".new")
        size = sum(memoryview(part).nbytes for part in parts)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_SIZES.pack(_MAGIC, len(header), size) + header)
                for part in parts:
                    file.write(part)
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"{path}: an app's state cannot be kept: {error.strerror}") from None


def _read(path: Path) -> tuple[bytes, memoryview] | None:
    """A header and what is behind it; None if they are not all there."""
    try:
        whole = memoryview(path.read_bytes())
        magic, header, size = _SIZES.unpack_from(whole)
    except (OSError, struct.error):
        return None
    end = _SIZES.size + header
    return (
        (bytes(whole[_SIZES.size : end]), whole[end:])
        if (magic, len(whole)) == (_MAGIC, end + size)
        else None
    )


def _reply_in(path: Path) -> Packed | None:
    found = _read(path)
    try:
        about = decode(pb.AppMessage.FromString(found[0])) if found is not None else None
    except (DecodeError, RemoteProtocolError):
        return None
    if about is None or found is None:
        return None
    return Packed(about, () if isinstance(about.content, AppError) else (found[1],))


def _number_of(path: Path) -> int:
    number = path.name.split(".")[1]
    return int(number) if number.isdigit() else 0


def _forget_others(folder: Path, in_use: Collection[str]) -> None:
    """Of runs whose end nobody has told this site, the oldest go."""
    with suppress(OSError):
        others = [each for each in folder.iterdir() if each.name not in in_use and each.is_dir()]
        for old in sorted(others, key=lambda path: path.stat().st_mtime_ns)[: -(MAX_RUNS - 1)]:
            shutil.rmtree(old, ignore_errors=True)


def _stem(run_id: str) -> str:
    """A folder's name for whatever a coordinator calls a run."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:32]
