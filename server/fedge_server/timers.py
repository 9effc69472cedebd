"""A run's deadlines on the event loop: one for each phase of each order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fedge.events import DeadlinePassed, OrderId


class Timers:
    """Each calls `passed` unless it is started again or dropped before."""

    def __init__(self, passed: Callable[[DeadlinePassed], None]) -> None:
        self._passed = passed
        self._handles: dict[tuple[OrderId, str], asyncio.TimerHandle] = {}

    def start(self, event: DeadlinePassed, seconds: float) -> None:
        key = (event.order, event.phase)
        if key in self._handles:
            self._handles[key].cancel()
        self._handles[key] = asyncio.get_running_loop().call_later(seconds, self._passed, event)

    def drop(self, order: OrderId) -> None:
        """An order is over."""
        for key in [key for key in self._handles if key[0] == order]:
            self._handles.pop(key).cancel()

    def clear(self) -> None:
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
