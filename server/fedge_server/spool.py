"""Where updates wait while they arrive and until they are summed: in memory while small, else in a file.

A file keeps the process's memory at the size of the model, however many uploads are under way. What
arrives is hashed and checked chunk by chunk, so that nothing wrong ever reaches an aggregate. Files have
names, so that accepted updates outlive the process: whoever kept name and digest finds them again.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from fedge.errors import RefusedError, StorageError
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import Array, all_finite, bytes_of, new_digest
from fedge.wire.limits import CHUNK_BYTES, INLINE_BYTES

_FLOAT = np.dtype("<f4")
_IDLE_FILES = 8
_SUFFIX = ".update"


@dataclass(frozen=True, slots=True)
class File:
    """An open file of the spool; its name is relative to the spool's folder."""

    descriptor: int
    name: str


class Spool:
    """The folder where large uploads wait. Its files serve one upload after another.

    A file that is written again has its pages in memory already: that is several times faster.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: list[File] = []
        self._in_use: set[str] = set()
        self._numbers = count(1)

    def upload(self, *, size: int, digest: bytes, masked: bool = False) -> Upload:
        """Room for a vector of so many bytes, which is taken as they arrive."""
        return Upload(self, size=size, digest=digest, masked=masked)

    def find(self, name: str, *, size: int, digest: bytes) -> Upload | None:
        """A complete upload of an earlier process; None if its file does not hold those bytes (any more)."""
        if Path(name).name != name or not name.endswith(_SUFFIX) or name in self._in_use:
            return None
        try:
            file = File(os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), name)
        except OSError:
            return None
        self._in_use.add(name)
        upload = Upload(self, size=size, digest=digest, file=_Lease(self, file))
        with suppress(RefusedError, StorageError):
            upload.reread()
            return upload
        return None

    def sweep(self) -> None:
        """Remove what earlier processes have left and nobody has found again."""
        with suppress(OSError):  # what stays is removed the next time
            for path in self._folder.iterdir():
                if path.name.endswith(_SUFFIX) and path.name not in self._in_use:
                    path.unlink(missing_ok=True)

    def shrink(self) -> None:
        """Give the room of all files back that no upload is in."""
        while self._idle:
            self._remove(self._idle.pop())

    def take(self) -> File:
        """A file that nobody else has; what is in it is of no meaning.

        Raises:
            OSError: the folder cannot hold one.
        """
        if self._idle:
            return self._idle.pop()
        for number in self._numbers:
            name = f"{number}{_SUFFIX}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with suppress(FileExistsError):  # an earlier process's
                file = File(os.open(self._folder / name, flags, 0o600), name)
                self._in_use.add(name)
                return file
        raise AssertionError("numbers do not end")

    def give_back(self, file: File) -> None:
        """The file may serve another upload."""
        if len(self._idle) < _IDLE_FILES:
            self._idle.append(file)
        else:
            self._remove(file)

    def _remove(self, file: File) -> None:
        os.close(file.descriptor)
        self._in_use.discard(file.name)
        with suppress(OSError):
            (self._folder / file.name).unlink()


class Upload:
    """One float32 vector of a known size and digest, arriving in chunks of whole elements.

    Complete, it is read as `upload[start:stop]`, on any thread. A `masked` one is bytes that mean nothing by
    themselves, in chunks of any size, and is read as a whole.
    """

    def __init__(
        self, spool: Spool, *, size: int, digest: bytes, file: _Lease | None = None, masked: bool = False
    ) -> None:
        self.size = size
        self.digest = digest
        self.masked = masked
        self._spool = spool
        self._hash = new_digest()
        self._received = 0
        self._memory = bytearray()
        self._file = file
        self._closed = False

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes.

        Raises:
            RefusedError: they are more than was announced, cut an element, or hold NaN or infinity.
            StorageError: the disk cannot take them.
        """
        if self._received + len(data) > self.size:
            raise _refused(
                RefusalCode.WRONG_LENGTH,
                f"expected {self.size} bytes, found at least {self._received + len(data)}",
            )
        if not self.masked:
            _check_floats(data)
        self._hash.update(data)
        if self.size <= INLINE_BYTES:
            self._memory += data
        else:
            self._write_at(self._received, memoryview(data))
        self._received += len(data)

    @property
    def missing(self) -> int:
        """Bytes that have not arrived yet."""
        return self.size - self._received

    def finish(self) -> None:
        """Check that everything is here and is what was announced.

        Raises:
            RefusedError: it is too short, or its digest differs.
        """
        if self._received != self.size:
            raise _refused(RefusalCode.WRONG_LENGTH, f"expected {self.size} bytes, found {self._received}")
        if self._hash.digest() != self.digest:
            raise _refused(RefusalCode.WRONG_DIGEST, "expected the announced digest, found another")

    def reread(self) -> None:
        """Look at every byte of a file that an earlier process has written, as `write` and `finish` do.

        Raises:
            RefusedError, StorageError: it is not what was announced, or cannot be read.
        """
        step = CHUNK_BYTES // _FLOAT.itemsize
        for start in range(0, len(self), step):
            part = self[start : start + step]
            self._hash.update(bytes_of(part))
            self._received += part.nbytes
        self.finish()

    @property
    def in_file(self) -> bool:
        return self._file is not None

    @property
    def closed(self) -> bool:
        return self._closed

    def held(self) -> Held:
        """What it takes to keep this upload, which may be closed meanwhile."""
        return Held(self._file, bytes(self._memory) if self._file is None else None)

    def __len__(self) -> int:
        """Elements of the vector."""
        return self.size // _FLOAT.itemsize

    def __getitem__(self, part: slice, /) -> Array:
        """Elements `start` to `stop`.

        Raises:
            StorageError: the disk does not give back what it took.
        """
        start, stop, _ = part.indices(len(self))
        start, stop = start * _FLOAT.itemsize, max(start, stop) * _FLOAT.itemsize
        return np.frombuffer(self.read(start, stop), _FLOAT)

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Bytes `start` to `stop`, of a complete upload.

        Raises:
            StorageError: the disk does not give back what it took.
        """
        if self._closed:
            raise ValueError("expected an upload that is not closed yet")
        file = self._file
        if file is None:
            return memoryview(self._memory)[start:stop]
        parts, at = [], start
        try:
            while at < stop and (part := os.pread(file.file.descriptor, stop - at, at)):
                parts.append(part)
                at += len(part)
        except OSError as error:
            raise StorageError(f"spool: an update cannot be read back: {error.strerror}") from None
        if at != stop:
            raise StorageError(f"spool: expected {stop - start} bytes of an update back, found {at - start}")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Drop the bytes, even while a thread is at them; harmless a second time."""
        self._closed = True
        self._memory = bytearray()
        self._file = None

    def _write_at(self, offset: int, data: memoryview) -> None:
        try:
            file = self._file = self._file or _Lease(self._spool)
            while data:
                written = os.pwrite(file.file.descriptor, data, offset)
                offset, data = offset + written, data[written:]
        except OSError as error:
            raise StorageError(f"spool: an update cannot be kept: {error.strerror}") from None


class _Lease:
    """A file for one upload; the spool has it back when the last thread that uses it lets go of it."""

    def __init__(self, spool: Spool, file: File | None = None) -> None:
        self.file = file if file is not None else spool.take()
        self._spool = spool

    def __del__(self) -> None:
        if hasattr(self, "_spool"):  # there was a file to take
            self._spool.give_back(self.file)


@dataclass(frozen=True, slots=True)
class Held:
    """An upload's bytes, in a file that serves nobody else while this lives, or in memory."""

    _file: _Lease | None
    inline: bytes | None

    @property
    def place(self) -> str:
        """The name of the file; empty if there is none."""
        return self._file.file.name if self._file is not None else ""

    def sync(self) -> None:
        """Make the file durable. On any thread.

        Raises:
            StorageError: the disk cannot.
        """
        if self._file is not None:
            try:
                os.fsync(self._file.file.descriptor)
            except OSError as error:
                raise StorageError(f"spool: an update cannot be kept: {error.strerror}") from None


def _check_floats(data: bytes | memoryview) -> None:
    if len(data) % _FLOAT.itemsize:
        raise _refused(
            RefusalCode.WRONG_LENGTH, f"expected chunks of whole elements, found {len(data)} bytes"
        )
    if not all_finite(np.frombuffer(data, _FLOAT)):
        raise _refused(RefusalCode.NOT_FINITE, "expected finite numbers, found NaN or infinity")


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))


NOTHING_HELD = Held(None, b"")
