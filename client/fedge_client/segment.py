"""Memory that agent and worker share: vectors are written once and never copied through a pipe.

A segment is an open file without a name: nothing is left behind, however either process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from fedge.vector import Array


class Segment:
    """A growable piece of shared memory behind a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._vector: Array = np.empty(0, np.float32)

    @classmethod
    def create(cls) -> Segment:
        """A new, empty segment; its descriptor may be inherited by a child that is told its number."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("fedge", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def vector(self, size: int, *, grow: bool = False) -> Array:
        """The segment as float32[size]; `grow` makes room first (the agent does, the worker never)."""
        if len(self._vector) != size:
            self._unmap()
            if grow:
                os.ftruncate(self.descriptor, 4 * size)
            if size:
                self._map = mmap.mmap(self.descriptor, 4 * size)
                self._vector = np.frombuffer(self._map, np.float32)
        return self._vector

    def close(self) -> None:
        self._unmap()
        os.close(self.descriptor)

    def _unmap(self) -> None:
        # The map itself is freed when the last array over it is gone.
        self._vector = np.empty(0, np.float32)
        self._map = None
