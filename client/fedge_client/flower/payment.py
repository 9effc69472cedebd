"""Which ledger pays for what a Flower node does, and when: the folder and the data set, for each message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import Context

from fedge.errors import ConfigError, RefusedError
from fedge.events import OrderId
from fedge.privacy.mechanism import Mechanism
from fedge_client.ledger import Ledger
from fedge_client.ledger_file import HEADS
from fedge_client.spending import as_told, log_refusal

LEDGER_KEY: Final = "fedge-ledger"
"""In a node's settings: the folder of the site's ledgers, an absolute path."""

_DATASET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PARTITION: Final = re.compile(r"partition-\d+-of-(\d+)")


@dataclass(frozen=True, slots=True)
class Ledgers:
    """Those of a machine's nodes, in `folder` (or where a node's settings say), each for a data set under one cap.

    Raises:
        ConfigError: the folder is no absolute path, or `dataset` no name.
    """

    delta: float
    max_epsilon: float
    folder: Path | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_absolute():
            raise ConfigError(
                f"ledger: expected an absolute path, the same wherever Flower starts, found {self.folder}"
            )
        if self.dataset is not None and not _DATASET.fullmatch(self.dataset):
            raise ConfigError(
                "dataset: expected up to 63 letters, digits, '.', '_' or '-', the first no mark, found "
                f"{self.dataset[:80]!r}"
            )

    @contextmanager
    def paying(self, context: Context, order: OrderId, cost: Mechanism) -> Iterator[None]:
        """Reserve before the work, and spend after it, whatever came of it: that it fails depends on the data, too. A
        process that dies in between has told nobody anything.

        Raises:
            RefusedError: the budget does not allow it, or the ledger cannot be used; in words that may be told.
        """
        with self._opened(context) as ledger:
            entry = ledger.reserve(
                _run_of(context), order, cost, unit="example", max_epsilon=self.max_epsilon
            )
            try:
                yield
            finally:
                ledger.sending(entry)
                ledger.commit(entry, cost)

    def note_unprotected(self, context: Context) -> None:
        """For those who see what comes now no epsilon bounds anything.

        Raises:
            RefusedError: as `paying`.
        """
        with self._opened(context) as ledger:
            ledger.unprotected(_run_of(context))

    @contextmanager
    def _opened(self, context: Context) -> Iterator[Ledger]:
        """The ledger of the node's data, whose refusals name what is left to the site's own log alone."""
        folder = self._folder_for(context)
        dataset = self._dataset_of(context, folder)
        try:
            with Ledger.open(folder, dataset, self.delta, head_folder=folder / HEADS) as opened:
                yield opened
        except RefusedError as error:
            log_refusal(error)
            raise as_told(error) from None

    def _folder_for(self, context: Context) -> Path:
        found = self.folder or context.node_config.get(LEDGER_KEY)
        if not isinstance(found, str | Path) or not Path(found).is_absolute():
            raise ConfigError(
                f"expected the absolute path of a folder for the site's ledgers, as `ledger` or as {LEDGER_KEY!r} in "
                "the node's settings, found none"
            )
        return Path(found)

    def _dataset_of(self, context: Context, folder: Path) -> str:
        """
        Raises:
            ConfigError: another division of the data has ledgers there already: each would begin with nothing spent.
        """
        config = context.node_config
        if self.dataset is not None or "partition-id" not in config:
            return self.dataset or "data"
        at, count = config["partition-id"], config.get("num-partitions")
        if type(at) is not int or at < 0 or not (count is None or (type(count) is int and count > at)):
            raise ConfigError(
                "expected 'partition-id' below 'num-partitions' in the node's settings, found others"
            )
        if count is None:
            return f"partition-{at}"
        kept = (path.stem for path in (*folder.glob("*.ledger"), *(folder / HEADS).glob("*.head")))
        others = {match[1] for name in kept if (match := _PARTITION.fullmatch(name))} - {str(count)}
        if others:
            raise ConfigError(
                f"expected one of {', '.join(sorted(others))} partitions, as this folder's ledgers have, found one of "
                f"{count}: the same examples were in others; give `dataset`, or another folder for other data"
            )
        return f"partition-{at}-of-{count}"


def _run_of(context: Context) -> str:
    return f"flower-{context.run_id}"
