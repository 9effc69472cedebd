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


class Upload:
    """One float32 vector of a known size and digest, arriving in chunks of whole elements.

    Complete, it is read as `upload[start:stop]`, on any thread.
    """

    def __init__(self, folder: Path, *, size: int, digest: bytes) -> None:
        self.size = size
        self._folder = folder
        self._digest = digest
        self._hash = new_digest()
        self._received = 0
        self._memory = bytearray()
        self._file: int | None = None
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
        self._received += len(data)
        if self.size <= _IN_MEMORY_BYTES:
            self._memory += data
            return
        try:
            self._append(memoryview(data))
        except OSError as error:
            raise StorageError(f"spool: an update cannot be kept: {error.strerror}") from None

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
        if self._file is None:
            return np.frombuffer(self._memory, _FLOAT)[start:stop]
        count = (stop - start) * _FLOAT.itemsize
        try:
            data = os.pread(self._file, count, start * _FLOAT.itemsize)
        except OSError as error:
            raise StorageError(f"spool: an update cannot be read back: {error.strerror}") from None
        if len(data) != count:
            raise StorageError(f"spool: expected {count} bytes of an update back, found {len(data)}")
        return np.frombuffer(data, _FLOAT)

    def close(self) -> None:
        """Drop the bytes; harmless a second time."""
        self._closed = True
        self._memory = bytearray()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()

    def _append(self, data: memoryview) -> None:
        if self._file is None:
            # Unnamed: the file is gone with the process, however it ends.
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._file = os.dup(file.fileno())
        while data:
            data = data[os.write(self._file, data) :]


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
