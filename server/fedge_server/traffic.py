"""What a run's rounds cost: bytes, refusals and seconds, counted between commits."""

from __future__ import annotations

import time

from fedge.events import OrderId


class Traffic:
    """Bytes, refusals and seconds since the last committed round."""

    def __init__(self) -> None:
        self.down = self.up = self.refused = 0
        self.seconds = 0.0
        self._began: float | None = None

    def begin(self, order: OrderId) -> None:
        if order.kind != "evaluate" and self._began is None:
            self._began = time.monotonic()

    def end(self, order: OrderId) -> Traffic:
        """What the committed round took; counting starts again at zero."""
        done = Traffic()
        done.down, done.up, done.refused = self.down, self.up, self.refused
        done.seconds = time.monotonic() - self._began if self._began is not None else 0.0
        self.down = self.up = self.refused = 0
        self._began = None
        return done
