"""Where updates wait while they arrive and until they are summed: in memory while small, else in a file.

A file keeps the process's memory at the size of the model, however many uploads are under way. What
arrives is hashed and checked chunk by chunk, so that nothing wrong ever reaches an aggregate.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from fedge.errors import RefusedError, StorageError
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import Array, all_finite, new_digest

_FLOAT = np.dtype("<f4")
_IN_MEMORY_BYTES = 4 << 20
_IDLE_FILES = 8


class Spool:
    """The folder where large uploads wait. Its files serve one upload after another.

    A file that is written again has its pages in memory already: that is several times faster.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: list[int] = []

    def upload(self, *, size: int, digest: bytes) -> Upload:
        """Room for a vector of so many bytes, which is taken as they arrive."""
        return Upload(self, size=size, digest=digest)

    def shrink(self) -> None:
        """Give the room of all files back that no upload is in."""
        while self._idle:
            os.close(self._idle.pop())

    def take(self) -> int:
        """The descriptor of a file that nobody else has; what is in it is of no meaning.

        Raises:
            OSError: the folder cannot hold one.
        """
        if self._idle:
            return self._idle.pop()
        # Unnamed: the file is gone with the process, however it ends.
        with tempfile.TemporaryFile(dir=self._folder) as file:
            return os.dup(file.fileno())

    def give_back(self, descriptor: int) -> None:
        """The file may serve another upload."""
        if len(self._idle) < _IDLE_FILES:
            self._idle.append(descriptor)
        else:
            os.close(descriptor)


class Upload:
    """One float32 vector of a known size and digest, arriving in chunks of whole elements.

    Complete, it is read as `upload[start:stop]`, on any thread.
    """

    def __init__(self, spool: Spool, *, size: int, digest: bytes) -> None:
        self.size = size
        self._spool = spool
        self._digest = digest
        self._hash = new_digest()
        self._received = 0
        self._memory = bytearray()
        self._file: _Lease | None = None
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
        if len(data) % _FLOAT.itemsize:
            raise _refused(
                RefusalCode.WRONG_LENGTH, f"expected chunks of whole elements, found {len(data)} bytes"
            )
        if not all_finite(np.frombuffer(data, _FLOAT)):
            raise _refused(RefusalCode.NOT_FINITE, "expected finite numbers, found NaN or infinity")
        self._hash.update(data)
        if self.size <= _IN_MEMORY_BYTES:
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
        if self._hash.digest() != self._digest:
            raise _refused(RefusalCode.WRONG_DIGEST, "expected the announced digest, found another")

    def __len__(self) -> int:
        """Elements of the vector."""
        return self.size // _FLOAT.itemsize

    def __getitem__(self, part: slice, /) -> Array:
        """Elements `start` to `stop`.

        Raises:
            StorageError: the disk does not give back what it took.
        """
        if self._closed:
            raise ValueError("expected an upload that is not closed yet")
        start, stop, _ = part.indices(len(self))
        stop = max(start, stop)
        file = self._file
        if file is None:
            return np.frombuffer(self._memory, _FLOAT)[start:stop]
        count = (stop - start) * _FLOAT.itemsize
        try:
            data = os.pread(file.descriptor, count, start * _FLOAT.itemsize)
        except OSError as error:
            raise StorageError(f"spool: an update cannot be read back: {error.strerror}") from None
        if len(data) != count:
            raise StorageError(f"spool: expected {count} bytes of an update back, found {len(data)}")
        return np.frombuffer(data, _FLOAT)

    def close(self) -> None:
        """Drop the bytes, even while a thread is at them; harmless a second time."""
        self._closed = True
        self._memory = bytearray()
        self._file = None

    def _write_at(self, offset: int, data: memoryview) -> None:
        try:
            file = self._file = self._file or _Lease(self._spool)
            while data:
                written = os.pwrite(file.descriptor, data, offset)
                offset, data = offset + written, data[written:]
        except OSError as error:
            raise StorageError(f"spool: an update cannot be kept: {error.strerror}") from None


class _Lease:
    """A file for one upload; the spool has it back when the last thread that uses it lets go of it."""

    def __init__(self, spool: Spool) -> None:
        self.descriptor = spool.take()
        self._spool = spool

    def __del__(self) -> None:
        if hasattr(self, "_spool"):  # there was a file to take
            self._spool.give_back(self.descriptor)


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
