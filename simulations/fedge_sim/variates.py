"""What simulated clients keep of their own from round to round: their control variates (`fedge.variates`), or their
personal layers (`fedge.personal`). Those who have taken part have some, as a site has on its disk: in memory up to a
limit, and beyond it in a file without a name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from typing import Final, Protocol

import numpy as np

from fedge.errors import RunError
from fedge.events import OrderId
from fedge.exact import Values
from fedge.personal import Split
from fedge.run import RunConfig, Work
from fedge.task import OwnTask, Task, load_framework
from fedge.variates import correct, renewed
from fedge.vector import Array, bytes_of

MAX_BYTES: Final = 1 << 28
"""Of variates in memory."""


class Own(Protocol):
    """What clients' work begins with beside the model: what corrects their gradients, or their personal layers."""

    @property
    def size(self) -> int:
        """Elements of each; 0 where there is nothing."""
        ...

    def of(self, client: str, order: OrderId) -> Array | None:
        """float32[size], to be left as it is; None if there is nothing."""
        ...

    def learned(self, client: str, order: OrderId, layers: Array) -> None:
        """What training has made of a client's personal layers, float32[size]: nobody writes over it."""
        ...


class Given:
    """What somebody else has, by client: what is learned is written there."""

    def __init__(self) -> None:
        self.rows: dict[str, Array] = {}

    @property
    def size(self) -> int:
        return next((len(each) for each in self.rows.values()), 0)

    def of(self, client: str, order: OrderId) -> Array | None:
        return self.rows.get(client)

    def learned(self, client: str, order: OrderId, layers: Array) -> None:
        self.rows[client][:] = layers


class Kept:
    """A vector of each client, float32[size]. What an update leaves is its client's own once the round is committed of
    which it is a part: another attempt at the round begins as the first one did."""

    def __init__(self, size: int, *, most_bytes: int = MAX_BYTES) -> None:
        self.size = size
        self._rows = Rows(size, most_bytes=most_bytes)
        self._own: dict[str, int] = {}
        self._left: dict[tuple[OrderId, str], int] = {}
        """Behind by updates that are not a part of a model yet."""

    def kept(self, client: str) -> Array | None:
        """A client's, to be left as it is; None if it has none yet."""
        row = self._own.get(client)
        return self._rows.read(row) if row is not None else None

    def keep(self, client: str, order: OrderId, vector: Array) -> None:
        """What its update for an order leaves.

        Raises:
            RunError: there is no room for it.
        """
        if (order, client) not in self._left:
            self._left[order, client] = self._rows.take()
        self._rows.write(self._left[order, client], vector)

    def commit(self, order: OrderId, clients: Collection[str]) -> None:
        """A round is committed by this attempt, with the updates of these clients: what others have left is of no
        use."""
        counted = frozenset(clients)
        for (made_for, client), row in self._left.items():
            unused = row
            if made_for == order and client in counted:
                unused, self._own[client] = self._own.get(client, -1), row
            if unused >= 0:
                self._rows.give_back(unused)
        self._left.clear()

    def close(self) -> None:
        """They are not needed any more."""
        self._rows.close()


class Layers:
    """The personal layers of all clients, which are `first` (float32[size]) before their first round."""

    nbytes = 0

    def __init__(self, first: Array, *, most_bytes: int = MAX_BYTES) -> None:
        self._first = first
        self._kept = Kept(len(first), most_bytes=most_bytes)

    @property
    def size(self) -> int:
        return len(self._first)

    def of(self, client: str, order: OrderId) -> Array | None:
        found = self._kept.kept(client)
        return found if found is not None else self._first

    def learned(self, client: str, order: OrderId, layers: Array) -> None:
        self._kept.keep(client, order, layers)

    def take(self, client: str, order: OrderId, update: Values) -> None:
        """What it has learned is here already."""

    def commit(self, order: OrderId, clients: Collection[str], control: Array | None) -> None:
        """As `Variates.commit`."""
        self._kept.commit(order, clients)

    def close(self) -> None:
        """They are not needed any more."""
        self._kept.close()


class Variates:
    """The control variates of all clients, and the server's, if there is one."""

    def __init__(
        self, control: Array | None, work: Work, *, bound: float | None = None, most_bytes: int = MAX_BYTES
    ) -> None:
        """`bound` is what elements of updates are cut to in secure sums."""
        self._control, self._work, self._bound = control, work, bound
        self._kept = Kept(len(control) if control is not None else 0, most_bytes=most_bytes)

    @property
    def size(self) -> int:
        return self._kept.size

    @property
    def nbytes(self) -> int:
        """Of the control variate that a training order comes with; 0 where there is none."""
        return self._control.nbytes if self._control is not None else 0

    def of(self, client: str, order: OrderId) -> Array | None:
        if self._control is None or order.kind != "train":
            return None
        own = self._kept.kept(client)
        if own is None:
            return self._control
        found = self._control.copy()
        correct(found, own)
        return found

    def learned(self, client: str, order: OrderId, layers: Array) -> None:
        """Not here: they follow from updates."""

    def take(self, client: str, order: OrderId, update: Values) -> None:
        """An update of a client is accepted.

        Raises:
            RunError: there is no room for what it leaves.
        """
        correction = self.of(client, order)
        if correction is None:
            return
        self._kept.keep(client, order, renewed(correction, update[:], self._work, bound=self._bound))

    def commit(self, order: OrderId, clients: Collection[str], control: Array | None) -> None:
        """A round is committed by this attempt, with the updates of these clients. `control` is the server's from now
        on.

        Raises:
            RunError: there was none before.
        """
        if control is not None and self._control is None:
            raise RunError(
                "expected a strategy that orders control variates from its first round on, found a later"
            )
        self._control = control
        self._kept.commit(order, clients)

    def close(self) -> None:
        """They are not needed any more."""
        self._kept.close()


def own_vectors(run: RunConfig, task: Task | OwnTask, control: Array | None) -> Variates | Layers:
    """Those of a run's clients, whose strategy begins with this control variate, if with any."""
    if isinstance(task, OwnTask) or not run.work.personal:
        bound = run.secure_aggregation.bound if run.secure_aggregation.enabled else None
        return Variates(control, run.work, bound=bound)
    whole = load_framework().initial_model(task, seed=run.seed)
    return Layers(Split.of(whole.layout, run.work.personal).personal_of(whole.vector))


class Rows:
    """Vectors, float32[size] each, of which `most_bytes` are in memory and the others in a temporary file."""

    def __init__(self, size: int, *, most_bytes: int) -> None:
        self._size = size
        self._most = most_bytes // (4 * size) if size else 0
        self._held: list[Array] = []
        self._free: list[int] = []
        self._count = 0
        self._file: int | None = None

    def take(self) -> int:
        """Room for one: its number."""
        if self._free:
            return self._free.pop()
        self._count += 1
        return self._count - 1

    def give_back(self, row: int) -> None:
        """It is not needed any more."""
        self._free.append(row)

    def read(self, row: int) -> Array:
        """What was written, to be left as it is."""
        if row < len(self._held):
            return self._held[row]
        assert self._file is not None  # it was written there
        found: Array = np.empty(self._size, np.float32)
        read = os.preadv(self._file, [bytes_of(found)], self._offset(row))
        assert read == found.nbytes  # as much as was written
        return found

    def write(self, row: int, vector: Array) -> None:
        """
        Raises:
            RunError: the temporary file has no room.
        """
        if row < len(self._held):
            self._held[row] = vector
        elif row == len(self._held) < self._most:
            self._held.append(vector)
        else:
            self._write(row, vector)

    def close(self) -> None:
        self._held = []
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _write(self, row: int, vector: Array) -> None:
        try:
            if self._file is None:
                with tempfile.TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
            data, at = bytes_of(vector), self._offset(row)
            while data:
                written = os.pwrite(self._file, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise RunError(
                f"what the clients keep does not fit into {tempfile.gettempdir()} ({error.strerror}): set TMPDIR "
                "to a folder with more room"
            ) from None

    def _offset(self, row: int) -> int:
        return 4 * self._size * (row - self._most)
