"""The work of several clients done at once, before the machine turns to each of them.

The round machine is told of one update after the other, as it is in a deployment; that they were computed together is
nobody's business. What was computed for an order that is called off is dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import numpy as np

from fedge.events import Send
from fedge.exact import Values
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_sim.engines.crew import Crew, Done, Rows, UnsuitedError
from fedge_sim.engines.elsewhere import Row

log = logging.getLogger(__name__)

_MAX_SPARED_BYTES: Final = 1 << 28
"""Of vectors of other orders, while a crew works on the next."""

CrewName = Literal["vectorised", "processes", "ray"]
Makers = Sequence[tuple[CrewName, Callable[[], Crew]]]
"""Crews by their names, the one that is preferred first."""


class Ahead:
    """Has a crew work for the clients that have the same order, as many at a time as it can.

    The first crew that suits the run is taken; `reasons` say why one did not. Where none is left every client is the
    loop's. With `insists` somebody has asked for the crew, and is told.
    """

    def __init__(self, makers: Makers, *, insists: bool) -> None:
        self._makers = deque(makers)
        self._insists = insists
        self._done: dict[Send, tuple[Outcome, Values] | None] = {}
        self._crew: Crew | None = None
        self.reasons: dict[str, str] = {}
        self.name: CrewName | Literal["loop"] = "loop"
        self._next()

    def together(self, sends: Sequence[Send], model: Array) -> tuple[list[Outcome], Rows] | None:
        """What the work of clients with the same order comes to, of as many as the crew does at once, and their
        updates, until the next call. None if they are to be taken one by one, or left to the loop."""
        if not self._is_for_the_crew(sends[0]):
            return None
        self._done.clear()  # of orders that were called off
        done = self._work(sends, model)
        if done is None:
            return None
        outcomes = [each for each in done[0] if each is not None]
        if len(outcomes) < len(done[0]):
            self.keep(sends, *done)
            return None
        return outcomes, done[1]

    def mean(self, weights: Sequence[int]) -> Array | None:
        """The exact mean of as many vectors as `together` has just returned, weighted so; None if the crew makes
        none."""
        return self._crew.mean(weights) if self._crew is not None else None

    def keep(self, sends: Sequence[Send], outcomes: Sequence[Outcome | None], vectors: Rows) -> None:
        """Have what `together` has returned taken one by one."""
        self._done |= {
            send: (outcome, vector) if outcome is not None else None
            for send, outcome, vector in zip(sends, outcomes, vectors, strict=False)
        }

    def take(
        self, send: Send, model: Array, others: Callable[[], Mapping[Send, Array]]
    ) -> tuple[Outcome, Array] | None:
        """What a client's work for an order comes to, done together with that of `others` who wait; None if the loop is
        to do it."""
        if self._is_for_the_crew(send):
            all_others = others()
            waiting = [
                other for other, its in all_others.items() if other.order == send.order and its is model
            ]
            self._spare(all_others)
            done = self._work([send, *waiting], model)
            if done is not None:
                self.keep([send, *waiting], *done)
        own = self._done.pop(send, None)
        return (own[0], own[1][:]) if own is not None else None

    def close(self) -> None:
        """Nobody works any more."""
        if self._crew is not None:
            self._crew.close()
        self._crew = None

    def _is_for_the_crew(self, send: Send) -> bool:
        """Whether this is work for it that is not done yet."""
        return self._crew is not None and send not in self._done and self._crew.does(send.order.kind)

    def _spare(self, others: Mapping[Send, Array]) -> None:
        """Keep what is done and still waited for where the crew does not write over it; drop the rest."""
        kept = {send: done for send, done in self._done.items() if send in others}
        if sum(_in_memory(done[1]) for done in kept.values() if done is not None) > _MAX_SPARED_BYTES:
            kept = {}  # to be done again when it is its turn
        self._done = {
            send: (done[0], _spared(done[1])) if done is not None else None for send, done in kept.items()
        }

    def _work(self, sends: Sequence[Send], model: Array) -> Done | None:
        while self._crew is not None:
            try:
                return self._crew.work(sends[: self._crew.most], model)
            except UnsuitedError as error:
                self._crew.close()
                self._crew = None
                self._fell_out(error)
                self._next()
        return None

    def _next(self) -> None:
        """The next crew takes over, if there is one."""
        self.name = "loop"
        while self._makers and self._crew is None:
            self._name, make = self._makers.popleft()
            try:
                self._crew, self.name = make(), self._name
            except UnsuitedError as error:
                self._fell_out(error)

    def _fell_out(self, error: UnsuitedError) -> None:
        self.reasons[self._name] = str(error)
        level = logging.WARNING if self._insists else logging.INFO
        to = self._makers[0][0] if self._makers else "loop"
        log.log(level, "engine_falls_back engine=%s to=%s reason=%s", self._name, to, error)


def _in_memory(vector: Values) -> int:
    """Bytes of a vector, if it lies in this machine's memory, or comes there when the crew works again."""
    return vector.nbytes if isinstance(vector, np.ndarray | Row) else 0


def _spared(vector: Values) -> Values:
    """A vector where the crew does not write over it."""
    return vector.copy() if isinstance(vector, np.ndarray) and vector.base is not None else vector
