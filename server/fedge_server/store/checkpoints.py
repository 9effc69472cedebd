"""Strategies' states in files: safetensors, named by their digest, complete or not there at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedge.errors import StorageError
from fedge.faults import Faults
from fedge.files import private_folder
from fedge.snapshot import TREE_KEY, Snapshot
from fedge.vector import new_digest
from fedge_server.store.records import Checkpoint

_SUFFIX = ".safetensors"
_TEMPORARY = "."


class Checkpoints:
    """A folder of states. Safe to use from several threads."""

    def __init__(self, folder: Path, faults: Faults | None = None) -> None:
        self._folder = private_folder(folder)
        self._faults = faults or Faults()

    def write(self, snapshot: Snapshot, *, round: int) -> Checkpoint:
        """Keep a state; it is durable when this returns. The same state twice is one file.

        Raises:
            StorageError: the folder is read-only or full; nothing is left behind.
        """
        digest, size = new_digest(), 0
        for part in snapshot.parts():
            digest.update(part)
            size += len(part)
        checkpoint = Checkpoint(round, digest.hexdigest(), size)
        path = self._path(checkpoint.digest)
        try:
            self._faults.reach("checkpoint.before")
            if not (path.exists() and path.stat().st_size == size):
                self._write(snapshot, path)
            self._faults.reach("checkpoint.after")
        except OSError as error:
            raise StorageError(f"{self._folder}: a checkpoint cannot be written: {error.strerror}") from None
        return checkpoint

    def read(self, checkpoint: Checkpoint) -> Snapshot:
        """The state of a checkpoint.

        Raises:
            StorageError: the file is missing, cannot be read, or is not what was written.
        """
        path = self._path(checkpoint.digest)
        try:
            digest = new_digest()
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
            if digest.hexdigest() != checkpoint.digest:
                raise StorageError(f"{path}: expected the state that was written there, found other bytes")
            with safe_open(path, framework="numpy") as opened:
                tree = (opened.metadata() or {})[TREE_KEY]
                return Snapshot(tree, {name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118  # no dict
        except (OSError, SafetensorError, KeyError) as error:
            raise StorageError(f"{path}: a checkpoint cannot be read back: {error}") from None

    def sweep(self, wanted: frozenset[str]) -> None:
        """Remove every file that is not one of these digests', and what an interrupted write has left."""
        with suppress(OSError):  # what stays is removed the next time
            for path in self._folder.iterdir():
                if path.name.startswith(_TEMPORARY) or path.name.removesuffix(_SUFFIX) not in wanted:
                    path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}{_SUFFIX}"

    def _write(self, snapshot: Snapshot, path: Path) -> None:
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                for part in snapshot.parts():
                    file.write(part)
                    self._faults.reach("checkpoint.half")
                file.flush()
                os.fsync(file.fileno())
            self._faults.reach("checkpoint.rename")
            Path(temporary).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
