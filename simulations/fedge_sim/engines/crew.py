"""What an engine is to the driver: a crew that does the work of many clients, before the machine turns to each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from fedge.events import Send
from fedge.exact import Values
from fedge.strategy import WorkKind
from fedge.vector import Array
from fedge_client.local import Outcome


class UnsuitedError(Exception):
    """A task or a machine that an engine can do nothing with, and why, for the person who asked for it."""


class Rows(Protocol):
    """The vectors (float32[size]) of several clients: an array [clients, size] that the crew writes over in its next
    work, or vectors that lie elsewhere and are fetched when their elements are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int, /) -> Values: ...

    def __iter__(self) -> Iterator[Values]: ...


Done = tuple[list[Outcome | None], Rows]
"""What some clients' work came to, in their order. None is a client whose work failed, or has come to something that is
not finite: the loop does it again, and says how."""


class Crew(Protocol):
    """Those who work."""

    @property
    def most(self) -> int:
        """Clients at once."""
        ...

    def does(self, kind: WorkKind) -> bool:
        """Whether orders of this kind are for it."""
        ...

    def work(self, sends: Sequence[Send], model: Array) -> Done:
        """The work of clients who have the same order and model (float32[size]).

        Raises:
            UnsuitedError: it cannot, nor ever will.
        """
        ...

    def mean(self, weights: Sequence[int]) -> Array | None:
        """The exact mean of the first so many vectors of the last work, weighted so: float32[size], the caller's. None
        if it is as well made elsewhere."""
        ...

    def close(self) -> None:
        """Nobody works any more."""
        ...
