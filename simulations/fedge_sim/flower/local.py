"""A Grid whose nodes are on this machine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from fedge.seeds import derive_seed
from fedge.wire.records import Packed
from fedge_client.apps.pool import Answered, Pool
from fedge_client.apps.process import Setting
from fedge_flower.grid import AppGrid
from fedge_flower.internals import NUM_PARTITIONS_KEY, PARTITION_ID_KEY


@contextmanager
def local_grid(setting: Setting, *, nodes: int, workers: int) -> Iterator[AppGrid]:
    """Nodes with a partition each; nobody works any more when the block is left.

    The Grid raises TaskError once a process cannot load the app's ClientApp.
    """
    grid = AppGrid(setting.run_id)
    carrier = _Local(setting, count=nodes, workers=workers, answered=grid.hear)
    try:
        yield grid.over(carrier)
    finally:
        carrier.pool.close()


class _Local:
    def __init__(self, setting: Setting, *, count: int, workers: int, answered: Answered) -> None:
        nodes = {
            derive_seed(setting.seed or 0, "node", at): {PARTITION_ID_KEY: at, NUM_PARTITIONS_KEY: count}
            for at in range(count)
        }
        self.pool = Pool(setting, nodes, workers=workers, answered=answered)

    def node_ids(self) -> list[int]:
        """By partition."""
        return self.pool.ids

    def give(self, messages: Sequence[Packed]) -> Sequence[bool]:
        return [self.pool.give(each) for each in messages]

    def drop(self, ids: Collection[str]) -> None:
        self.pool.drop(ids)

    def check(self) -> None:
        if self.pool.failure is not None:
            raise type(self.pool.failure)(str(self.pool.failure))
