"""Which secure sums this site has begun with, and which it has helped to open: on disk before it does either.

    <folder>/<hash of the run's id>.json    of one run: for each kind of order the latest attempt, and the latest
                                            round that is spent

Two sums over nearly the same sites differ by a few updates. So an attempt is begun once, with keys that no other one
has, also by an agent that was started again; and once a site has revealed shares for a round, that round is over for
it, whatever the coordinator says became of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fedge.errors import ConfigError, RefusedError, StorageError
from fedge.events import OrderId
from fedge.files import private_folder, read_capped, write_private
from fedge.refusal import Refusal, RefusalCode

MAX_RUNS: Final = 100_000
"""Of which a site keeps this. No run is ever forgotten: a coordinator could ask for it again."""

_MAX_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class _Run:
    begun: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """For each kind of order the latest round and attempt."""
    spent: Mapping[str, int] = field(default_factory=dict)


class SpentRounds:
    """Of all runs of this site. Blocks: it writes to disk, and waits until that is durable."""

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder)
        self._runs: dict[str, _Run] = {}

    def begin(self, run_id: str, order: OrderId) -> None:
        """Note that this site is about to show keys for an attempt.

        Raises:
            RefusedError: ROUND_SPENT; it has revealed shares for this round, or a later one, before.
                Or UPDATE_LOST; it has begun with this attempt, or a later one, before.
            StorageError: it cannot be noted, or what was noted cannot be read: nothing may be begun.
        """
        run = self._run(run_id)
        self._check(run, order)
        if run.begun.get(order.kind, (0, 0)) >= (order.round, order.attempt):
            raise RefusedError(
                Refusal(
                    RefusalCode.UPDATE_LOST,
                    f"this site has begun with the {order}, or with a later one, and was started again since",
                )
            )
        begun = {**run.begun, order.kind: (order.round, order.attempt)}
        self._note(run_id, replace(run, begun=begun))

    def spend(self, run_id: str, order: OrderId) -> None:
        """Note that this site is about to reveal shares for a round.

        Raises:
            RefusedError: ROUND_SPENT; as `begin`.
            StorageError: as `begin`.
        """
        run = self._run(run_id)
        self._check(run, order)
        self._note(run_id, replace(run, spent={**run.spent, order.kind: order.round}))

    def _check(self, run: _Run, order: OrderId) -> None:
        spent = run.spent.get(order.kind, 0)
        if order.round <= spent:
            raise RefusedError(
                Refusal(
                    RefusalCode.ROUND_SPENT,
                    f"this site has helped to open the sum of {order.kind} round {spent}: it takes part in no other "
                    "attempt at that round or an earlier one",
                )
            )

    def _run(self, run_id: str) -> _Run:
        if run_id not in self._runs:
            path = self._path(run_id)
            self._runs[run_id] = _read(path) if path.exists() else _Run()
        return self._runs[run_id]

    def _note(self, run_id: str, run: _Run) -> None:
        path = self._path(run_id)
        if not path.exists() and sum(1 for _ in self._folder.glob("*.json")) >= MAX_RUNS:
            raise StorageError(
                f"{self._folder}: expected at most {MAX_RUNS} runs with secure aggregation: remove the files of runs "
                "that no coordinator has any more"
            )
        del self._runs[run_id]  # if this fails, the disk says what holds
        write_private(path, json.dumps({"begun": dict(run.begun), "spent": dict(run.spent)}))
        self._runs[run_id] = run

    def _path(self, run_id: str) -> Path:
        """A file's name for whatever a coordinator calls a run."""
        return self._folder / f"{hashlib.sha256(run_id.encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> _Run:
    try:
        data: Any = json.loads(read_capped(path, max_bytes=_MAX_BYTES))
        begun = {str(kind): (int(round), int(attempt)) for kind, (round, attempt) in data["begun"].items()}
        spent = {str(kind): int(round) for kind, round in data["spent"].items()}
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError):
        raise StorageError(
            f"{path}: expected what this site has revealed in a run, found a damaged file: put it back from a copy; "
            "without it this site takes no part in that run's secure sums"
        ) from None
    return _Run(begun, spent)
