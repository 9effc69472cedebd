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
        self._fill(now)
        self._level -= amount
        return max(0.0, -self._level / self._rate)

    def covers(self, amount: float, *, now: float) -> bool:
        """Whether so much could be taken without credit."""
        self._fill(now)
        return not self._rate or self._level >= amount

    def _fill(self, now: float) -> None:
        if self._at is not None:
            self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


class Pace:
    """Spreads sites that are sent away: each is given a moment of its own to come back, `after_s` or later."""

    def __init__(self, *, after_s: float, rate: float = ARRIVALS_PER_S) -> None:
        self._after_s = after_s
        self._rate = rate
        self._arrivals = Bucket(rate, burst=rate)
        self._last = 0.0

    def admit(self, *, now: float) -> None:
        """Count an arrival.

        Raises:
            BusyError: too many have come at once; it says when this one should.
        """
        if not self._arrivals.covers(1, now=now):
            raise BusyError("many sites are connecting at once", retry_after_s=self.return_in_s(now=now))
        self._arrivals.take(1, now=now)

    def return_in_s(self, *, now: float) -> float:
        """Seconds until the next moment that nobody has yet."""
        self._last = max(self._last, now + self._after_s) + 1 / self._rate
        return self._last - now


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
