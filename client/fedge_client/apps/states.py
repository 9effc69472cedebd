"""What a site keeps of an app on disk: each node's state, together with the reply that came with it.

    <folder>/<hash of the run's id>/<node>.<number>.kept

State and reply are written in one piece: a process that is killed has both or neither, and a message that comes again
is answered by the reply that was kept, or dealt with from the state as it was before. Nothing is synced: a crash of the
process loses nothing that was written, a loss of power may.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
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

_SUFFIX: Final = ".kept"
_SIZES: Final = struct.Struct("<4sIQQ")
_MAGIC: Final = b"fgk1"


class States:
    """One app's run. Made anew, it has what an earlier process kept. For any thread, one at a time for each node."""

    def __init__(self, folder: Path, run_id: str) -> None:
        """
        Raises:
            StorageError: the folder cannot be written.
        """
        self._folder = private_folder(private_folder(folder) / _stem(run_id))
        self._lock = threading.Lock()
        self._newest: dict[int, tuple[int, memoryview]] = {}
        self._files: dict[str, tuple[int, int]] = {}
        """Of replies that are wanted still, by their messages' ids: the node, and the number of its file."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            self._find(path)
        _forget_others(folder, self._folder)

    @property
    def ids(self) -> list[str]:
        """The messages whose replies are kept."""
        with self._lock:
            return list(self._files)

    def state(self, node: int) -> Sequence[Buffer]:
        """As records are packed; nothing for a node that has none yet."""
        with self._lock:
            return (self._newest[node][1],) if node in self._newest else ()

    def keep(self, node: int, reply: Packed, state: memoryview) -> None:
        """Keep a node's state and the reply that it was made with.

        Raises:
            StorageError: they cannot be written; what was kept before stands.
        """
        with self._lock:
            before = self._newest.get(node)
        number = before[0] + 1 if before is not None else 1
        about = encode(reply.about).SerializeToString()
        path, parts = self._path(node, number), [about, *reply.payload, state]
        try:
            temporary = path.with_suffix(".new")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_SIZES.pack(_MAGIC, len(about), reply.size, state.nbytes))
                for part in parts:
                    file.write(part)
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"{path}: an app's state cannot be kept: {error.strerror}") from None
        with self._lock:
            self._newest[node] = number, state
            self._files[reply.about.reply_to] = node, number
            if before is not None and (node, before[0]) not in self._files.values():
                self._path(node, before[0]).unlink(missing_ok=True)

    def reply(self, id: str) -> Packed | None:
        """The reply to a message, if it is kept."""
        with self._lock:
            node, number = self._files.get(id, (0, 0))
        found = _read(self._path(node, number)) if number else None
        return found[0] if found is not None else None

    def forget(self, id: str) -> None:
        """Nobody needs the reply to a message any more."""
        with self._lock:
            node, number = self._files.pop(id, (0, 0))
            if number and self._newest[node][0] != number:
                self._path(node, number).unlink(missing_ok=True)

    def close(self) -> None:
        """The run is over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _find(self, path: Path) -> None:
        node, _, number = path.name.removesuffix(_SUFFIX).partition(".")
        found = _read(path) if node.isdigit() and number.isdigit() else None
        if found is None:
            return
        reply, state = found
        self._files[reply.about.reply_to] = int(node), int(number)
        if int(number) > self._newest.get(int(node), (0, state))[0]:
            self._newest[int(node)] = int(number), state

    def _path(self, node: int, number: int) -> Path:
        return self._folder / f"{node}.{number}{_SUFFIX}"


def _read(path: Path) -> tuple[Packed, memoryview] | None:
    """A reply and a state; None if they are not all there."""
    try:
        whole = memoryview(path.read_bytes())
        magic, about, payload, state = _SIZES.unpack_from(whole)
        if magic != _MAGIC or len(whole) != _SIZES.size + about + payload + state:
            return None
        at = _SIZES.size
        reply = decode(pb.AppMessage.FromString(bytes(whole[at : at + about])))
        at += about
        has_payload = not isinstance(reply.content, AppError)
        return Packed(reply, (whole[at : at + payload],) if has_payload else ()), whole[at + payload :]
    except (OSError, struct.error, DecodeError, RemoteProtocolError):
        return None


def _forget_others(folder: Path, mine: Path) -> None:
    """Of runs whose end nobody has told this site, the oldest go."""
    with suppress(OSError):
        others = [each for each in folder.iterdir() if each != mine and each.is_dir()]
        for old in sorted(others, key=lambda path: path.stat().st_mtime_ns)[: -(MAX_RUNS - 1)]:
            shutil.rmtree(old, ignore_errors=True)


def _stem(run_id: str) -> str:
    """A folder's name for whatever a coordinator calls a run."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:32]
