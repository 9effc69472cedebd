"""Simulated clients of a task that trains by itself: a Flower client, for instance. One after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fedge.errors import ConfigError, RefusedError, TaskError
from fedge.events import OrderId, Send
from fedge.run import RunConfig
from fedge.seeds import work_seed
from fedge.task import OwnTask, Site
from fedge.vector import Array
from fedge_client.local import Local, Outcome
from fedge_sim.adversaries import IN_THE_DATA
from fedge_sim.privacy import Accounts
from fedge_sim.virtual.devices import Load

_ONE: Final = 1
"""A client's examples, where they do not matter: at client level it has one release a round, whatever it has."""


class OwnClients:
    """All of them. Whoever was asked once keeps what its task keeps for it, as a site's worker does."""

    def __init__(self, run: RunConfig, task: OwnTask, names: Iterable[str], accounts: Accounts) -> None:
        """
        Raises:
            ConfigError: the run has something done to the clients' data, which only the task knows.
        """
        _check(run)
        self._run, self._task, self._accounts = run, task, accounts
        self._sites = {name: index for index, name in enumerate(names)}
        self._locals: dict[str, Local] = {}

    def pay(self, client: str, order: OrderId) -> None:
        """As `Clients.pay`."""
        if self._accounts.terms is not None:
            self._accounts.charge(client, order.kind, _ONE)

    def demands(self, send: Send, model: Array) -> tuple[Load, int]:
        """As `Clients.demands`, without devices."""
        return Load(0, 0, 0), 0

    def perform(self, client: str, order: OrderId, model: Array, *, out: Array) -> Outcome:
        """As `Clients.perform`.

        Raises:
            RefusedError: the client does not do it.
            TaskError: the task's code fails.
        """
        seed = work_seed(self._run.seed, site=client, kind=order.kind, round=order.round)
        try:
            local = self._local(client)
            return local.do(
                order, seed=seed, model=model, out=out, private=None, progress=lambda done, total: None
            )
        except (TaskError, RefusedError):
            raise
        except Exception as error:  # user code may raise anything
            raise TaskError(f"the task failed: {type(error).__name__}: {error}") from error

    def _local(self, client: str) -> Local:
        if client not in self._locals:
            site = Site(client, index=self._sites[client], count=len(self._sites))
            self._locals[client] = self._task.local(site, self._run.work)
        return self._locals[client]


def _check(run: RunConfig) -> None:
    settings = run.simulation
    wanted = {
        "partition": settings.partition != "task",
        "feature_skew": settings.feature_skew != 0,
        "label_noise": settings.label_noise != 0,
        "devices": settings.devices is not None,
        "adversaries.attack": settings.adversaries.share > 0 and settings.adversaries.attack in IN_THE_DATA,
    }
    found = [f"simulation.{name}" for name, is_on in wanted.items() if is_on]
    if found:
        raise ConfigError(
            f"{', '.join(found)}: expected a task whose data are known, found one that trains by itself; leave it out"
        )
