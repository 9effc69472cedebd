"""How much of this process one site may have, and how fast sites may come. Pure: time is an argument.

What is beyond a limit is not queued here: its sender is told to come back, and when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fedge.errors import BusyError

ARRIVALS_PER_S: Final = 1000.0
"""Sessions that begin in a second, at most: each costs a handshake and, if runs are open, their offers."""

_FULL_S: Final = 30.0


class Bucket:
    """A token bucket: `rate` a second on average, and up to `burst` at once. A rate of 0 is no limit."""

    def __init__(self, rate: float, *, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at: float | None = None

    def take(self, amount: float, *, now: float) -> float:
        """Take so much, on credit if need be; returns the seconds until that is paid for."""
        if not self._rate:
            return 0.0
        if self._at is not None:
            self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        self._level -= amount
        return max(0.0, -self._level / self._rate)

    def available(self, *, now: float) -> bool:
        """Whether one more is covered."""
        level, self._level, at = self._level, self._level, self._at
        gained = (now - at) * self._rate if at is not None else 0.0
        return not self._rate or min(self._burst, level + gained) >= 1


class Pace:
    """Spreads sites that are sent away: each is given a moment of its own to come back."""

    def __init__(self, rate: float = ARRIVALS_PER_S) -> None:
        self._rate = rate
        self._arrivals = Bucket(rate, burst=rate)
        self._next = 0.0

    def admit(self, *, now: float) -> None:
        """Count an arrival.

        Raises:
            BusyError: too many have come at once; it says when this one should.
        """
        if not self._arrivals.available(now=now):
            raise BusyError(
                "many sites are connecting at once", retry_after_s=self.return_in_s(now=now, after_s=1.0)
            )
        self._arrivals.take(1, now=now)

    def return_in_s(self, *, now: float, after_s: float = 0.0) -> float:
        """Seconds until the next free moment, `after_s` or later."""
        self._next = max(self._next, now + after_s) + 1 / self._rate
        return self._next - now

    def when_full(self, *, now: float) -> float:
        """When to ask again for a place that somebody has to give up first."""
        return self.return_in_s(now=now, after_s=_FULL_S)


class Concurrency:
    """Things under way at once: so many for each key, and so many in all."""

    def __init__(self, what: str, *, each: int, in_all: int | None = None) -> None:
        self._what = what
        self._each = each
        self._in_all = in_all
        self._under_way: Counter[str] = Counter()
        self._total = 0

    @contextmanager
    def one_of(self, key: str) -> Iterator[None]:
        """Count one for as long as the block lasts.

        Raises:
            BusyError: there are as many as may be.
        """
        if self._under_way[key] >= self._each:
            raise BusyError(f"expected at most {self._each} {self._what} of one site at once")
        if self._in_all is not None and self._total >= self._in_all:
            raise BusyError(f"expected at most {self._in_all} {self._what} at once")
        self._under_way[key] += 1
        self._total += 1
        try:
            yield
        finally:
            self._total -= 1
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]
