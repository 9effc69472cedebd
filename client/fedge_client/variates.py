"""A site's control variates on its disk: what it has learned of its own gradients in each run (`fedge.variates`).

    <folder>/<hash of the run's id>.<round>-<attempt>            of the site's update for that order
    <folder>/<hash of the run's id>.<round>-<attempt>.refused    of one that the coordinator has not taken

Each is float32 behind the digest of its bytes. They never leave the site. One counts from the next round on if the
round was committed by that attempt. What is lost is zero again, as before a site's first round. Nothing is synced.
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

_REFUSED: Final = ".refused"
_DIGEST_BYTES: Final = 32
_MOST: Final = 128
_MOST_BYTES: Final = 1 << 30
_LEAST: Final = 3
"""Variates of a run that are kept, of rounds that the coordinator may lose: as many as fit in so many bytes."""


class Variates:
    """A folder of them, of the last `max_runs` runs. `read` and `write` may be called on any thread."""

    def __init__(self, folder: Path, *, max_runs: int) -> None:
        self._folder, self._max_runs = folder, max_runs

    def read(self, run_id: str, order: OrderId, settled: Settled, *, size: int) -> Array | None:
        """The site's, float32[size], for an order; None if it has none."""
        found = [at for at in self._there(run_id) if at[0] < order.round and settled.counts(*at)]
        if not found:
            return None
        path = self._path(run_id, *max(found))
        try:
            with path.open("rb") as file:
                digest = file.read(_DIGEST_BYTES)
                data = file.read(4 * size + 1)
        except OSError as error:
            log.warning("control_variate_begins_anew run=%s reason=%s", run_id, error)
            return None
        if len(data) != 4 * size or digest_of(data) != digest:
            log.warning("control_variate_begins_anew run=%s reason=%s is damaged", run_id, path)
            return None
        variate: Array = np.frombuffer(data, np.float32)
        return variate

    def write(self, run_id: str, order: OrderId, settled: Settled, variate: Array) -> None:
        """Keep the one that an order's work has made, and of those before it what may be needed again.

        Raises:
            StorageError: the folder cannot be written.
        """
        path = self._path(run_id, order.round, order.attempt)
        with _errors(path):
            private_folder(self._folder)
            data, temporary = bytes_of(variate), path.with_suffix(".new")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(digest_of(data))
                file.write(data)
            temporary.replace(path)
            self._forget_all_but(
                run_id, order, settled, most=max(_LEAST, min(_MOST, _MOST_BYTES // len(data)))
            )
            self._make_room()

    def refused(self, run_id: str, order: OrderId) -> None:
        """The site's update for an order does not count."""
        path = self._path(run_id, order.round, order.attempt)
        with suppress(OSError):
            path.replace(path.with_name(path.name + _REFUSED))

    def handed_in(self, run_id: str, order: OrderId) -> None:
        """It is handed in: maybe the very update that was made for another attempt at the round."""
        path = self._path(run_id, order.round, order.attempt)
        if path.exists():
            return
        for other in self._folder.glob(f"{_stem(run_id)}.{order.round}-*"):
            with suppress(OSError):
                other.replace(path)

    def forget(self, run_id: str) -> None:
        """The run is over."""
        for path in self._of(run_id):
            with suppress(OSError):
                path.unlink()

    def _forget_all_but(self, run_id: str, order: OrderId, settled: Settled, *, most: int) -> None:
        """What is needed: this one, and of what counts the latest that the coordinator cannot lose, with all later."""
        there = sorted(self._there(run_id))
        safe = [at for at in there if at[0] <= settled.kept and at[0] < order.round and settled.counts(*at)]
        later = [at for at in there if settled.kept < at[0] <= order.round]
        needed = {self._path(run_id, *at) for at in [*safe[-1:], *later][-most:]}
        for path in self._of(run_id):
            if path not in needed:
                path.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Forget runs that ended while nobody told this site: those that were worked for longest ago."""
        last: dict[str, int] = {}
        for path in self._folder.iterdir():
            stem = path.name.partition(".")[0]
            last[stem] = max(last.get(stem, 0), path.stat().st_mtime_ns)
        for stem in sorted(last, key=lambda each: last[each])[: -self._max_runs]:
            for path in self._folder.glob(f"{stem}.*"):
                path.unlink(missing_ok=True)

    def _there(self, run_id: str) -> list[tuple[int, int]]:
        """The rounds and attempts whose variate is here, and not refused."""
        found = []
        for path in self._of(run_id):
            round, _, attempt = path.suffix[1:].partition("-")
            if round.isdecimal() and attempt.isdecimal():
                found.append((int(round), int(attempt)))
        return found

    def _of(self, run_id: str) -> list[Path]:
        return list(self._folder.glob(f"{_stem(run_id)}.*"))

    def _path(self, run_id: str, round: int, attempt: int) -> Path:
        return self._folder / f"{_stem(run_id)}.{round}-{attempt}"


def _stem(run_id: str) -> str:
    """A file's name for whatever a coordinator calls a run."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:32]


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: a control variate cannot be kept: {error.strerror}") from None
