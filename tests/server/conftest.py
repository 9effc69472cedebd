"""A run of the coordinator's in this process: fake sites, no gRPC, and an outbox that keeps everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.errors import RunError
from fedge.events import Failed, Joined, Left, OrderId
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.run_state import Stop
from fedge.signing import SignedDirectory
from fedge.strategy import AnyStrategy
from fedge.vector import Array, Layout, Model, Tensor, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_order_id
from fedge_server.archive import Archive
from fedge_server.driver import RunDriver, Surroundings
from fedge_server.spool import Spool, Upload
from fedge_server.store.database import Database
from fedge_server.store.records import RunRecord
from fedge_server.store.store import Store

LAYOUT = Layout((Tensor("w", (4,)),))


@dataclass
class Run:
    """A driver, and its sites as the driver sees them."""

    folder: Path
    driver: RunDriver
    sent: list[tuple[str, pb.ServerMessage]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    uploads: list[Upload] = field(default_factory=list)

    @cached_property
    def spool(self) -> Spool:
        return Spool(self.folder / "spool")

    def orders(self, site: str, kind: str = "") -> list[OrderId]:
        """The orders that a site was sent, oldest first."""
        found = [decode_order_id(m.order.id) for s, m in self.sent if s == site and m.HasField("order")]
        return [order for order in found if order.kind == kind or not kind]

    def messages(self, site: str, kind: str) -> list[Any]:
        return [getattr(m, kind) for s, m in self.sent if s == site and m.HasField(kind)]

    def join(self, *sites: str) -> None:
        for site in sites:
            self.driver.post(Joined(site))

    def leave(self, site: str) -> None:
        self.driver.post(Left(site))

    def stop(self) -> None:
        self.driver.post(Stop())

    def fail(self, site: str, order: OrderId, message: str = "no") -> None:
        self.driver.post(Failed(site, order, Refusal(RefusalCode.TASK_FAILED, message)))

    async def deliver(
        self, site: str, order: OrderId, value: float | Array = 1.0, *, examples: int = 10, **metrics: float
    ) -> Refusal | None:
        """Hand in an update as the service does once it has checked it; returns the receipt's refusal."""
        upload = None
        if order.kind != "evaluate":
            size = self.driver.layout.size
            vector = value if isinstance(value, np.ndarray) else np.full(size, value, np.float32)
            upload = self.spool.upload(size=vector.nbytes, digest=digest_of(vector))
            upload.write(vector.tobytes())
            upload.finish()
        update = pb.Update(
            num_examples=examples, metrics=[pb.Metric(name=name, value=v) for name, v in metrics.items()]
        )
        refusal = await self.driver.deliver(site, order, update, upload)
        await settle()
        self.uploads += [upload] if upload is not None else []
        if upload is not None and refusal is not None:
            assert not has_room(upload), "what does not count takes no room"
        return refusal

    async def ended(self) -> str:
        """Wait for the run's end; returns its status."""
        assert self.task is not None
        await self.task
        assert not any(has_room(upload) for upload in self.uploads), "the room of every update is free"
        return self.driver.machine.status


def has_room(upload: Upload) -> bool:
    """Whether an update still takes memory or disk."""
    try:
        upload[0:1]
    except ValueError:
        return False
    return True


async def settle() -> None:
    """Let everything happen that does not wait for a clock or a thread."""
    for _ in range(30):
        await asyncio.sleep(0)


def config_of(**tables: Any) -> RunConfig:
    table = {"name": "a", "task": "app:task", "rounds": 2, "evaluation": {"every": 0}, **tables}
    return RunConfig.from_table(table, source="run.toml")


async def no_keys() -> SignedDirectory:
    raise RunError("no directory of keys here")


StartRun = Callable[..., Coroutine[Any, Any, Run]]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    """A store in a SQLite file, and folders for checkpoints and uploads."""
    database = Database(f"sqlite:///{tmp_path / 'fedge.db'}")
    database.open()
    (tmp_path / "spool").mkdir()
    opened = Archive(Store(database), tmp_path / "checkpoints")
    yield opened
    opened.close()
    database.close()


@pytest.fixture
def start_run(tmp_path: Path, archive: Archive) -> StartRun:
    """Begin a run of some strategy; `size` elements that are all 0; tables as in run.toml."""

    numbers = count(1)

    async def start(strategy: AnyStrategy, *sites: str, size: int = 4, **tables: Any) -> Run:
        layout = LAYOUT if size == 4 else Layout((Tensor("w", (size,)),))
        sent: list[tuple[str, pb.ServerMessage]] = []
        config = config_of(**tables)
        record = RunRecord(f"a-{next(numbers)}", config.name, "", b"", repr(strategy), 0.0, "admin")
        model = Model(np.zeros(size, np.float32), layout)
        around = Surroundings(lambda site, message: sent.append((site, message)), archive, no_keys)
        driver = RunDriver.begin(record, config, strategy, model, around)
        await archive.call(archive.add_run, record, driver.first_moment())
        run = Run(tmp_path, driver, sent)
        run.join(*sites)
        run.task = asyncio.create_task(driver.run())
        await settle()
        return run

    return start


@pytest.fixture
def play() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Play a scenario to its end; one that hangs fails instead."""
    return lambda scenario: asyncio.run(asyncio.wait_for(scenario, 20))
