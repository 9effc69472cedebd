"""Preflight: everything that `fedge client start` will need, tried one thing after another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from fedge.errors import FedgeError, TaskError
from fedge.task import OwnTask, Site, load_any_task
from fedge_client import admission
from fedge_client.identity import Identity, load_identity
from fedge_client.ledger_file import read_only
from fedge_client.link import Link
from fedge_client.settings import ClientSettings, load_client

Outcome = tuple[str, str | FedgeError]


def run_checks(path: Path, task: str | None) -> Iterator[Outcome]:
    """Yield (what was checked, what was found or the error); ends at the first that others depend on."""
    try:
        settings = load_client(path)
        yield "settings", str(path)
    except FedgeError as error:
        yield "settings", error
        return
    folder = path.parent.resolve()
    try:
        identity = load_identity(folder / settings.identity, now=datetime.now(UTC))
        yield "identity", f"{identity.principal.uri}, valid until {identity.principal.not_after:%Y-%m-%d}"
    except FedgeError as error:
        yield "identity", error
        return
    try:
        yield "link", asyncio.run(_greet(settings, identity))
    except FedgeError as error:
        yield "link", error
    try:
        yield "budget", _budget(settings, folder)
    except FedgeError as error:
        yield "budget", error
    if task is not None:
        try:
            yield "task", _load(settings, folder, identity.site, task)
        except FedgeError as error:
            yield "task", error


async def _greet(settings: ClientSettings, identity: Identity) -> str:
    link = Link.of(settings.server, identity)
    try:
        call, welcome = await link.open_session(probe=True)
        call.cancel()
        admission.check_coordinator(settings.policy, welcome.federation, own=identity.federation)
        return f"{settings.server} answers: {welcome.software}, federation {welcome.federation}"
    finally:
        await link.close()


def _budget(settings: ClientSettings, folder: Path) -> str:
    policy, place = settings.policy, settings.ledger
    books = read_only(folder / place.path, place.dataset, head_folder=folder / settings.identity).books
    spent = books.spent().epsilon(policy.delta)
    return f"spent {spent:.4g} of {policy.max_epsilon:g} at delta {policy.delta:g}, data set {place.dataset}"


def _load(settings: ClientSettings, folder: Path, site: str, name: str) -> str:
    task_folder = folder / settings.task.path
    admission.check_task(settings.policy, name, folder=task_folder)
    task = load_any_task(name, path=task_folder)
    if isinstance(task, OwnTask):
        return f"{name} trains by itself: its data are looked at when it does"
    try:
        train, test = task.data(Site(site, MappingProxyType(settings.data.table)))
        return f"{name} has {len(train)} training and {len(test)} test examples"
    except Exception as error:  # user code may raise anything
        raise TaskError(f"{name}: its data cannot be loaded: {type(error).__name__}: {error}") from error
