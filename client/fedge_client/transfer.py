"""Bulk that has to get through: what a broken call has left is gone on with, as long as there is a link.

A link that is closed ends it: the session is then over, and what was under way goes on over the next one,
when the coordinator has sent its order again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from fedge.errors import BusyError, LinkError, RefusedError
from fedge.refusal import Refusal, RefusalCode

log = logging.getLogger(__name__)

R = TypeVar("R")

_FIRST_S: Final = 0.25
_LEAST_S: Final = 0.05
_MAX_S: Final = 10.0


class Closable(Protocol):
    """A link, which may be closed under a call."""

    @property
    def closed(self) -> bool: ...


class Transfers:
    """At most one transfer at a time, which may be called off."""

    def __init__(self) -> None:
        self._under_way: asyncio.Task[Any] | None = None
        self._unwanted = False

    def begin(self) -> None:
        """A new order: what was called off before is forgotten."""
        self._unwanted = False

    @property
    def unwanted(self) -> bool:
        return self._unwanted

    def call_off(self) -> None:
        """What is transferred for the present order is not wanted any more."""
        self._unwanted = True
        if self._under_way is not None:
            self._under_way.cancel()

    async def insist(self, link: Closable, attempt: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """The result of `attempt`, made again, with full jitter between, while only the link is in the way.

        Raises:
            LinkError: the link is closed.
            RefusedError: with the code CANCELLED; it was called off.
        """
        failures = 0
        while True:
            self.check_wanted()
            task = asyncio.create_task(attempt())
            self._under_way = task
            try:
                return await task
            except LinkError as error:
                if link.closed:
                    raise
                wait_s = pause_s(error, failures)
                failures += 1
                log.info("transfer_interrupted again_in_s=%.1f reason=%s", wait_s, error)
            except asyncio.CancelledError:
                caller = asyncio.current_task()
                if caller is None or caller.cancelling() or not self._unwanted:
                    raise
                wait_s = 0.0  # it was called off, which is said below
            finally:
                task.cancel()
                self._under_way = None
            self.check_wanted()
            await asyncio.sleep(wait_s)

    def check_wanted(self) -> None:
        """Raise RefusedError (CANCELLED) if it was called off."""
        if self._unwanted:
            raise RefusedError(Refusal(RefusalCode.CANCELLED, "called off by the coordinator"))


def pause_s(error: LinkError, failures: int) -> float:
    """How long to wait: as the peer says, if it does; else full jitter, with a longest wait that doubles."""
    if isinstance(error, BusyError):
        return max(_LEAST_S, error.retry_after_s) * random.uniform(1.0, 1.1)  # noqa: S311  # jitter, not a secret
    longest = min(_MAX_S, _FIRST_S * 2.0 ** min(failures, 10))
    return random.uniform(0, longest)  # noqa: S311  # jitter, not a secret
