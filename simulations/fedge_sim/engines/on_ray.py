"""The crew of a Ray cluster: cohorts are its tasks, and updates stay on the nodes that made them.

An order's model is put into the object store once, from where each node fetches it once. What comes back is what
clients report and, when a round is over, an exact partial sum of each task's updates; the updates themselves come only
where something has to look at each of them. A node that is lost takes nothing with it that others cannot do again: Ray
repeats its tasks, also those whose vectors are gone when their sum is wanted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import ray
from ray import exceptions as failures

from fedge.errors import ConfigError, RunError
from fedge.events import Send
from fedge.exact import ExactSum
from fedge.run import RunConfig
from fedge.strategy import WorkKind
from fedge.task import Task
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_sim.clients import Clients
from fedge_sim.engines import node
from fedge_sim.engines.crew import Done, UnsuitedError
from fedge_sim.engines.setting import setting_of
from fedge_sim.engines.stacks import Stacks

log = logging.getLogger(__name__)

STACKED: Final = 64
"""Clients of a task whose models are stacked: as many on any cluster, since who is in a stack may change a last bit."""

MAX_TASK_BYTES: Final = 1 << 26
"""Of the vectors of a task."""

_TASKS: Final = 4
"""For each worker and order, of clients that are trained one by one: so that nobody waits long for the slowest."""

_RETRIES: Final = 3
"""Of a task whose worker or node was lost; more often, and it is the task that costs them their lives."""

_SAID_EVERY_S: Final = 30.0
_LOST_S: Final = 300.0
"""Without a processor in the whole cluster, after which it is not waited for any more."""

_REACHED_S: Final = 10.0


class OnRay:
    """Workers of the cluster that RAY_ADDRESS names, or else of the one that this machine is part of.

    With `stacked` the models of a task's clients are stacked, if that can be done for the first of the run. `workers`
    tasks at most are worked on at a time: as many as the cluster has processors for, unless given.

    Raises:
        ConfigError: there is no cluster, or it has another version of Ray or Python.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        clients: Clients,
        *,
        kind: WorkKind,
        size: int,
        stacked: bool,
        workers: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self._size, self._given = size, workers
        self._stacked = stacked
        self._stacks: Callable[[], Stacks] = lambda: Stacks(run, task, clients)
        self._clients, self._learns = clients, bool(run.work.personal)
        self._told = {**setting_of(run, kind=kind, folder=folder), "path": sys.path}
        self._setting: Any = None
        self._mine = _connected()
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": _RETRIES}
        spread: dict[str, Any] = {"num_returns": 3, "scheduling_strategy": "SPREAD"}
        self._train: Any = ray.remote(node.train).options(**options, **spread)
        self._add_up: Any = ray.remote(node.add_up).options(**options)  # where the vectors are
        self._tasks: list[_Task] = []
        self._busy: dict[Any, _Task] = {}

    @property
    def most(self) -> int:
        return sys.maxsize

    def does(self, kind: WorkKind) -> bool:
        return True

    def work(self, sends: Sequence[Send], model: Array) -> Done:
        outcomes: list[Outcome | None] = [None] * len(sends)
        with _translated():
            if self._setting is None:
                # Found out here and once, so that it does not depend on which process gets whose work.
                self._stacked = self._stacked and self._can_be_stacked(sends, model)
                self._setting = ray.put(json.dumps({**self._told, "stacked": self._stacked}))
            share = self._share(len(sends))
            starts = range(0, len(sends), share)
            self._tasks = [_Task(range(start, min(start + share, len(sends)))) for start in starts]
            shared = ray.put(np.ascontiguousarray(model))

            def begin(task: _Task) -> Any:
                its = [sends[place] for place in task.places]
                said, task.rows, task.own = self._train.remote(
                    self._setting, shared, _order(its), self._own(its)
                )
                return said

            for task, said in self._done(self._tasks, begin, self._given or len(self._tasks)):
                found = json.loads(said)
                if "failed" in found:
                    raise ConfigError(f"a node of the Ray cluster cannot begin: {found['failed']}")
                for place, its in zip(task.places, found["done"], strict=True):
                    outcomes[place] = Outcome(its[0], its[1]) if its is not None else None
                self._learn([(sends[place], outcomes[place]) for place in task.places], task.own)
        width = 0 if sends[0].order.kind == "evaluate" else self._size
        return outcomes, [_Held(task, at, width) for task in self._tasks for at in range(len(task.places))]

    def mean(self, weights: Sequence[int]) -> Array | None:
        """Nodes add up what they have made; here there are as many sums to add as there were tasks."""
        total = ExactSum(self._size)

        def begin(task: _Task) -> Any:
            return self._add_up.remote(
                task.rows, [weights[place] for place in task.places[: task.among(weights)]]
            )

        with _translated():
            wanted = [task for task in self._tasks if task.among(weights)]
            # Each is twice a model: no more of them at once than there are workers to make them.
            for _, partial in self._done(wanted, begin, self._workers):
                total.add_partial(partial)
        return total.mean(sum(weights))

    def close(self) -> None:
        """The cluster is left as it was found."""
        with suppress(Exception):  # it may be gone
            for reference in self._busy:
                ray.cancel(reference, force=True)
        self._tasks, self._busy, self._setting = [], {}, None
        if self._mine:
            ray.shutdown()
        self._mine = False

    def _can_be_stacked(self, sends: Sequence[Send], model: Array) -> bool:
        try:
            self._stacks().work(sends[:STACKED], model)
        except UnsuitedError as error:
            log.warning("ray_trains_one_by_one reason=%s", error)
            return False
        return True

    def _own(self, sends: Sequence[Send]) -> Array | None:
        """What they have of their own, float32[clients, elements]; None if nothing."""
        found = [self._clients.own.of(send.client, send.order) for send in sends]
        rows = [each for each in found if each is not None]
        return np.stack(rows) if rows else None

    def _learn(self, done: Sequence[tuple[Send, Outcome | None]], theirs: Any) -> None:
        """What they have of their own now, which lies where the work was done."""
        if done[0][0].order.kind != "train" or not self._learns:
            return
        for (send, outcome), row in zip(done, ray.get(_next_of([theirs])), strict=True):
            if outcome is not None:
                self._clients.own.learned(send.client, send.order, row.copy())

    @property
    def _workers(self) -> int:
        return self._given or max(1, _processors("cluster_resources"))

    def _share(self, count: int) -> int:
        """Clients of a task, of so many that have the same order."""
        most = max(1, MAX_TASK_BYTES // (4 * self._size))
        return min(most, STACKED if self._stacked else max(1, math.ceil(count / (_TASKS * self._workers))))

    def _done(
        self, tasks: Sequence[_Task], begin: Callable[[_Task], Any], most: int
    ) -> Iterator[tuple[_Task, Any]]:
        """What is begun for each, `most` at a time, as it comes to an end."""
        waiting = deque(tasks)
        self._busy = {}
        while waiting or self._busy:
            while waiting and len(self._busy) < most:
                task = waiting.popleft()
                self._busy[begin(task)] = task
            reference = _next_of([*self._busy])
            yield self._busy.pop(reference), ray.get(reference)


@dataclass(slots=True, eq=False)
class _Task:
    """The clients at these places of an order; `rows` is where their vectors are, `own` what they have of their own."""

    places: range
    rows: Any = None
    own: Any = None
    fetched: Array | None = None
    taken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def among(self, weights: Sequence[int]) -> int:
        """How many of its clients are among the first so many of the order."""
        return len(range(self.places.start, min(self.places.stop, len(weights))))

    def fetch(self) -> Array:
        """float32[clients, size], in this process from then on: until none of them is needed any more."""
        with self.lock:
            if self.fetched is None:
                with _translated():
                    self.fetched = np.array(ray.get(_next_of([self.rows])))
            return self.fetched

    def drop(self) -> None:
        """One of them is not needed any more."""
        with self.lock:
            self.taken += 1
            if self.taken >= len(self.places):
                self.fetched = None


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A vector that lies on a node."""

    task: _Task
    at: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice, /) -> Array:
        found: Array = self.task.fetch()[self.at, part]
        if part == slice(None):  # as who takes one asks for it, once
            found = found.copy()
            self.task.drop()
        return found


def _next_of(references: list[Any]) -> Any:
    """The first of these that is there.

    Raises:
        RunError: the cluster has nobody to make it.
    """
    lost = 0.0
    while True:
        ready, _ = ray.wait(references, num_returns=1, timeout=_SAID_EVERY_S)
        if ready:
            return ready[0]
        processors = _processors("cluster_resources")
        free = _processors("available_resources")
        log.warning("ray_waits tasks=%d processors=%d free=%d", len(references), processors, free)
        lost = 0.0 if processors else lost + _SAID_EVERY_S
        if lost >= _LOST_S:
            raise RunError(
                f"the Ray cluster has had no processor for {lost / 60:g} minutes: expected one at least"
            )


def _processors(which: Literal["cluster_resources", "available_resources"]) -> int:
    """Of the cluster: all, or those that are free."""
    resources: dict[str, float] = getattr(ray, which)()  # Ray annotates neither
    return int(resources.get("CPU", 0))


def _order(sends: Sequence[Send]) -> str:
    order = sends[0].order
    told = {"kind": order.kind, "round": order.round, "attempt": order.attempt}
    return json.dumps({**told, "clients": [send.client for send in sends]})


def _connected() -> bool:
    """Connect this process to the cluster; whether it was not before.

    Raises:
        ConfigError: there is none, or it is another.
    """
    if ray.is_initialized():
        return False
    _reach(_address())
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ConfigError(
            "engine ray: expected a Ray cluster that this machine is part of, or the address of one in RAY_ADDRESS, "
            f"found none ({_short(error)}): start one with 'ray start --head'"
        ) from error
    except (RuntimeError, ValueError) as error:  # another version, or no address
        raise ConfigError(f"engine ray: cannot connect to the Ray cluster: {_short(error)}") from error
    return True


def _address() -> str | None:
    """Where a cluster is said to be: by RAY_ADDRESS, or else by what `ray start` writes down; None if nowhere."""
    if given := os.environ.get("RAY_ADDRESS"):
        return given
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    try:
        return (folder / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _reach(address: str | None) -> None:
    """Whether anybody listens there, which Ray itself would find out in a quarter of an hour.

    Raises:
        ConfigError: nobody does.
    """
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return  # "auto", none, or something that Ray understands
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"engine ray: expected a Ray cluster at {address}, found that it cannot be reached ({error}): start it, or "
            "set RAY_ADDRESS to the address of another"
        ) from error


@contextmanager
def _translated() -> Iterator[None]:
    """What Ray raises, in our words.

    Raises:
        RunError: a task fails, or the cluster does.
    """
    try:
        yield
    except failures.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        hint = (
            " (is the same fedge installed on all nodes, with its extras?)"
            if isinstance(cause, ImportError)
            else ""
        )
        raise RunError(f"a task on the Ray cluster failed: {_short(cause)}{hint}") from error
    except failures.OutOfMemoryError as error:
        raise RunError(
            f"a node of the Ray cluster has no memory for a task (fewer --workers need less): {_short(error)}"
        ) from error
    except (failures.WorkerCrashedError, failures.NodeDiedError) as error:
        raise RunError(
            f"the Ray cluster has lost a task, after {_RETRIES} repetitions: {_short(error)}"
        ) from error
    except failures.RayError as error:
        raise RunError(f"the Ray cluster has failed: {_short(error)}") from error


def _short(error: BaseException) -> str:
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0][:300] if said else 'without a word'}"
