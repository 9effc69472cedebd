"""Where updates wait while they arrive: in memory while small, in a private unnamed file when large.

A file keeps the process's memory at the size of the model, however many uploads are under way. What
arrives is hashed and checked chunk by chunk, so that nothing wrong ever reaches an aggregate.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedge.errors import RefusedError, StorageError
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import Array
from fedge.wire.limits import CHUNK_BYTES

_FLOAT = np.dtype("<f4")


class Upload:
    """One float32 vector of a known size and digest, arriving in chunks of whole elements."""

    def __init__(self, folder: Path, *, size: int, digest: bytes) -> None:
        self.size = size
        self._digest = digest
        self._hash = hashlib.sha256()
        self._received = 0
        # Unnamed: the file is gone with the process, however it ends.
        self._file = tempfile.SpooledTemporaryFile(max_size=4 * CHUNK_BYTES, dir=str(folder))  # noqa: SIM115  # closed by `close`

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
        if not np.isfinite(np.frombuffer(data, _FLOAT)).all():
            raise _refused(RefusalCode.NOT_FINITE, "expected finite numbers, found NaN or infinity")
        self._hash.update(data)
        self._received += len(data)
        try:
            self._file.write(data)
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

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """`(offset in elements, values)`, one chunk in memory at a time."""
        self._file.seek(0)
        offset = 0
        while data := self._file.read(CHUNK_BYTES):
            values = np.frombuffer(data, _FLOAT)
            yield offset, values
            offset += len(values)

    def close(self) -> None:
        """Drop the bytes; harmless a second time."""
        self._file.close()


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
