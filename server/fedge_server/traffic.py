"""What a run's rounds cost: bytes, refusals and seconds, counted between commits."""

from __future__ import annotations

import time

from fedge.events import OrderId
from fedge.history import Row
from fedge.pipeline import Aggregate


class Traffic:
    """Bytes, refusals and seconds since the last committed round."""

    def __init__(self) -> None:
        self.down = self.up = self.refused = 0
        self._began: float | None = None

    def begin(self, order: OrderId) -> None:
        if order.kind != "evaluate" and self._began is None:
            self._began = time.monotonic()

    def row(self, order: OrderId, aggregate: Aggregate) -> Row:
        """The committed round, with what it took; counting starts again at zero."""
        row = Row(
            round=order.round,
            attempt=order.attempt,
            clients=aggregate.clients,
            num_examples=aggregate.num_examples,
            seconds=time.monotonic() - self._began if self._began is not None else 0.0,
            bytes_down=self.down,
            bytes_up=self.up,
            refused=self.refused,
            staleness=aggregate.staleness,
            metrics=aggregate.metrics,
        )
        self.down = self.up = self.refused = 0
        self._began = None
        return row
