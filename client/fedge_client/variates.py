"""What a site keeps of its own in each run, on its disk: its control variates (`fedge.variates`), or its personal
layers (`fedge.personal`).

    <folder>/<hash of the run's id><hash of its terms>.<round>-<attempt>    of the site's update for that order

Each is float32 behind the digest of its bytes. They never leave the site, and are of no use under other terms than
those under which they were made. An order says of which the update is in the model. What is lost is as before a site's
first round. Nothing is synced.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from fedge.errors import StorageError
from fedge.events import OrderId
from fedge.files import private_folder
from fedge.variates import Settled
from fedge.vector import Array, bytes_of, digest_of

log = logging.getLogger(__name__)

_DIGEST_BYTES: Final = 32
_MOST: Final = 128
_MOST_BYTES: Final = 1 << 30
_LEAST: Final = 3
"""Variates of a run that are kept, of rounds that the coordinator may lose: as many as fit in so many bytes."""


class Variates:
    """A folder of them, of the last `max_runs` runs. `read` and `write` may be called on any thread."""

    def __init__(self, folder: Path, *, max_runs: int) -> None:
        self._folder, self._max_runs = folder, max_runs

    def read(self, run_id: str, terms: bytes, settled: Settled, *, size: int) -> Array | None:
        """The site's, float32[size], for an order; None if it has none."""
        if settled.counted is None:
            return None
        path = self._path(run_id, terms, settled.counted)
        try:
            with path.open("rb") as file:
                digest = file.read(_DIGEST_BYTES)
                data = file.read(4 * size + 1)
        except OSError as error:
            log.warning("own_state_begins_anew run=%s reason=%s", run_id, error)
            return None
        if len(data) != 4 * size or digest_of(data) != digest:
            log.warning("own_state_begins_anew run=%s reason=%s is damaged", run_id, path)
            return None
        variate: Array = np.frombuffer(data, np.float32)
        return variate

    def write(self, run_id: str, terms: bytes, order: OrderId, settled: Settled, variate: Array) -> None:
        """Keep the one that an order's work has made, and of those before it what may be needed again.

        Raises:
            StorageError: the folder cannot be written.
        """
        path = self._path(run_id, terms, (order.round, order.attempt))
        with _errors(path):
            private_folder(self._folder)
            data, temporary = bytes_of(variate), path.with_suffix(".new")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(digest_of(data))
                file.write(data)
            temporary.replace(path)
            most = max(_LEAST, min(_MOST, _MOST_BYTES // max(1, len(data))))
            needed = self._needed(run_id, terms, order, settled)[-most:]
            for other in self._of(run_id):
                if other not in needed:
                    other.unlink(missing_ok=True)
            self._make_room()

    def handed_in(self, run_id: str, terms: bytes, order: OrderId) -> None:
        """An update is handed in: maybe the very one that was made for another attempt at the round."""
        path = self._path(run_id, terms, (order.round, order.attempt))
        if path.exists():
            return
        for other in self._folder.glob(f"{_stem(run_id, terms)}.{order.round}-*"):
            with suppress(OSError):
                other.replace(path)

    def forget(self, run_id: str) -> None:
        """The run is over."""
        for path in self._of(run_id):
            with suppress(OSError):
                path.unlink()

    def _needed(self, run_id: str, terms: bytes, order: OrderId, settled: Settled) -> list[Path]:
        """This one and the one that counts, before it; and if the coordinator may lose that one's round, all earlier
        ones."""
        own = (order.round, order.attempt)
        earlier = []
        if settled.counted is not None:
            there = [at for at in self._there(run_id, terms) if at <= settled.counted]
            earlier = there[-1:] if settled.counted[0] <= settled.kept else there
        return [self._path(run_id, terms, at) for at in [*earlier, own]]

    def _make_room(self) -> None:
        """Forget runs that ended while nobody told this site: those that were worked for longest ago."""
        last: dict[str, int] = {}
        for path in self._folder.iterdir():
            stem = path.name.partition(".")[0]
            last[stem] = max(last.get(stem, 0), path.stat().st_mtime_ns)
        for stem in sorted(last, key=lambda each: last[each])[: -self._max_runs]:
            for path in self._folder.glob(f"{stem}.*"):
                path.unlink(missing_ok=True)

    def _there(self, run_id: str, terms: bytes) -> list[tuple[int, int]]:
        """The rounds and attempts whose variate is here, the latest last."""
        found = []
        for path in self._folder.glob(f"{_stem(run_id, terms)}.*"):
            round, _, attempt = path.suffix[1:].partition("-")
            if round.isdecimal() and attempt.isdecimal():
                found.append((int(round), int(attempt)))
        return sorted(found)

    def _of(self, run_id: str) -> list[Path]:
        return list(self._folder.glob(f"{_stem(run_id)}*"))

    def _path(self, run_id: str, terms: bytes, at: tuple[int, int]) -> Path:
        return self._folder / f"{_stem(run_id, terms)}.{at[0]}-{at[1]}"


def _stem(run_id: str, terms: bytes = b"") -> str:
    """A file's name for whatever a coordinator calls a run, and under whatever terms."""
    run = hashlib.sha256(run_id.encode()).hexdigest()[:32]
    return run + hashlib.sha256(terms).hexdigest()[:16] if terms else run


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: what this site has learned cannot be kept: {error.strerror}") from None
