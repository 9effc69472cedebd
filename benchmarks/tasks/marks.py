"""A site's own clock: the moment of every training step, so that rounds are also timed from outside.

Each step appends one float64, `time.monotonic()`, to the file that `[data] marks` of client.toml names.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedge import Site

Loss = Callable[[Any, Any], Any]
SUBMITTED = "FEDGE_BENCHMARK_SUBMITTED"
"""The environment variable that names the file for `submitting`."""

_PACKED = struct.Struct("<d")


class Marks:
    """Marks the steps of one task in one process; does nothing where the site has no file for them."""

    def __init__(self) -> None:
        self._file: int | None = None

    def open(self, site: Site) -> None:
        path = site.config.get("marks")
        if path is not None and self._file is None:
            self._file = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def submitting(self) -> None:
        """`run submit` builds the model just before it submits: note when, if it is asked to."""
        path = os.environ.get(SUBMITTED)
        if path is not None:
            Path(path).write_bytes(_PACKED.pack(time.monotonic()))

    def around(self, loss: Loss) -> Loss:
        """The loss, which also marks each call."""

        def marked(output: Any, target: Any) -> Any:
            if self._file is not None:
                os.write(self._file, _PACKED.pack(time.monotonic()))
            return loss(output, target)

        return marked


def read_marks(path: Path) -> list[float]:
    """The moments that a site has marked so far."""
    data = path.read_bytes() if path.exists() else b""
    return [value for (value,) in _PACKED.iter_unpack(data[: len(data) // _PACKED.size * _PACKED.size])]
