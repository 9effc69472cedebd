"""A site's jobs with a worker and a link that are a few lines each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from authorities import enrolled, new_authority

from fedge.errors import LinkError, RefusedError
from fedge.events import OrderId
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.secagg.site import Rules
from fedge.strategy import WorkKind
from fedge.vector import Array, Layout, Tensor, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_blob, encode_layout, encode_order_id, encode_work
from fedge.wire.limits import INLINE_BYTES
from fedge_client import pipe_pb2 as pipe
from fedge_client.directory import KnownDirectory
from fedge_client.download import Download
from fedge_client.identity import Identity
from fedge_client.jobs import Jobs
from fedge_client.ledger import Ledger
from fedge_client.secure_sessions import SecureSessions
from fedge_client.settings import ClientSettings, Policy
from fedge_client.spending import Spending
from fedge_client.spent import SpentRounds

SLOTS = 2
SIZE, LARGE = 4, INLINE_BYTES // 4 + 1


@dataclass
class Worker:
    """The supervisor's surface: leaves `result` in the slot, or refuses."""

    loads: dict[str, pipe.Load] = field(default_factory=dict)
    segments: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    corrections: dict[str, Array] = field(default_factory=dict)
    corrected: list[list[float]] = field(default_factory=list)
    """By what the gradients of each order are corrected that comes with a control variate."""
    performed: list[pipe.Perform] = field(default_factory=list)
    cancels: int = 0
    result: float = 1.0
    metrics: dict[str, float] = field(default_factory=lambda: {"train_loss": 0.5})
    refusal: Refusal | None = None
    trouble: Exception | None = None
    steps: int = 0
    personal: int = 0
    """Elements of personal layers: each is one more after each training."""
    began: list[list[float]] = field(default_factory=list)
    """The personal layers with which each order began."""

    def free_slot(self) -> int | None:
        used = {load.slot for load in self.loads.values()}
        return next((slot for slot in range(SLOTS) if slot not in used), None)

    def vectors(self, slot: int, size: int) -> tuple[Array, Array]:
        return self.segments.setdefault(slot, (np.zeros(size, np.float32), np.zeros(size, np.float32)))

    def own(self, run_id: str, size: int) -> Array:
        return self.corrections.setdefault(run_id, np.zeros(size, np.float32))

    async def load(self, load: pipe.Load) -> pipe.Loaded:
        self._behave()
        self.loads[load.run_id] = load
        return pipe.Loaded(run_id=load.run_id, train_examples=3, test_examples=2, personal=self.personal)

    async def perform(self, message: pipe.Perform, *, progress: Callable[[int, int], None]) -> pipe.Finished:
        self.performed.append(message)
        if message.own == pipe.OWN_CORRECTION:
            self.corrected.append(self.corrections[message.run_id].tolist())
        if message.own in (pipe.OWN_LAYERS, pipe.OWN_FIRST_LAYERS):
            layers = self.corrections[message.run_id]
            if message.own == pipe.OWN_FIRST_LAYERS:
                layers[:] = 0
            self.began.append(layers.tolist())
            layers += message.id.kind == pb.KIND_TRAIN
        self._behave()
        for done in range(1, self.steps + 1):
            progress(done, self.steps)
        model, update = self.segments[self.loads[message.run_id].slot]
        update[:] = model + np.float32(self.result)
        metrics = [pb.Metric(name=name, value=value) for name, value in self.metrics.items()]
        return pipe.Finished(num_examples=3, metrics=metrics)

    def cancel(self) -> None:
        self.cancels += 1

    def release(self, run_id: str) -> None:
        self.loads.pop(run_id)

    def _behave(self) -> None:
        if self.refusal is not None:
            raise RefusedError(self.refusal)
        if self.trouble is not None:
            raise self.trouble


@dataclass
class Link:
    """Fetches what rides inline; keeps what is delivered; breaks `breaks` times first."""

    delivered: list[tuple[bytes, bytes]] = field(default_factory=list)
    breaks: int = 0
    breaks_in: str = "fetch deliver"
    on_fetch: Callable[[], None] = lambda: None
    on_break: Callable[[], None] = lambda: None

    closed: bool = False
    arrived: int = 0
    """Bytes of the update that came before the link broke."""

    async def fetch(self, run_id: str, download: Download) -> None:
        self.on_fetch()
        self._break("fetch")
        assert download.complete, "it rides inline"

    async def resume(self, update: pb.Update) -> int:
        return self.arrived

    async def deliver(self, update: pb.Update, view: memoryview, *, offset: int = 0) -> pb.Receipt:
        assert offset == self.arrived
        self._break("deliver")
        self.delivered.append((update.SerializeToString(), bytes(view)))
        return pb.Receipt(run_id=update.run_id, id=update.id)

    def _break(self, where: str) -> None:
        if self.breaks and where in self.breaks_in:
            self.breaks -= 1
            self.on_break()
            raise LinkError("broken")


@cache
def identity_of_one() -> Identity:
    """A site's, for all tests of a process: to enrol takes a while."""
    now = datetime.now(UTC).replace(microsecond=0)
    with TemporaryDirectory() as folder:
        return enrolled(new_authority(Path(folder), now=now)[0], "icu-1", now=now)


@dataclass
class Site:
    folder: Path
    policy: Policy = field(default_factory=lambda: Policy(max_runs=SLOTS))

    def __post_init__(self) -> None:
        (self.folder / "app.py").write_text("raise SystemExit('never imported here')")
        self.worker, self.link = Worker(), Link()
        self.sent: list[pb.ClientMessage] = []
        settings = ClientSettings(server="h:1", policy=self.policy)
        worker: Any = self.worker
        self.ledger = Ledger.open(self.folder / "ledger", "data", self.policy.delta, head_folder=self.folder)
        spending = Spending(self.ledger, self.policy)
        identity = identity_of_one()
        sessions = SecureSessions(
            identity,
            KnownDirectory.open(self.folder, identity),
            SpentRounds(self.folder / "secure"),
            rules=Rules(),
            send=self.sent.append,
            failed=lambda run_id, order: None,
        )
        self.jobs = Jobs(settings, self.folder, worker, spending, sessions, self.sent.append)

    def restarted(self) -> Site:
        """Another agent in its place, which finds what this one has kept."""
        self.ledger.close()
        return Site(self.folder, self.policy)

    def employ(self, worker: Worker) -> None:
        self.worker = worker
        self.jobs._supervisor = worker  # type: ignore[assignment]  # its surface
        self.jobs._performer._supervisor = worker  # type: ignore[assignment]  # its surface

    def consider(self, offer: pb.Offer) -> pb.ClientMessage:
        """The one answer to an offer."""
        asyncio.run(self.jobs.consider(offer))
        (answer,) = self.sent
        self.sent.clear()
        return answer

    def refuses(self, offer: pb.Offer) -> Refusal:
        refusal = self.consider(offer).refuse.refusal
        assert self.worker.free_slot() is not None or len(self.worker.loads) == SLOTS
        assert offer.run_id not in self.jobs.runs
        return Refusal(RefusalCode(refusal.code), refusal.message)

    def do(self, order: pb.Order) -> list[pb.ClientMessage]:
        link: Any = self.link
        asyncio.run(self.jobs.do(order, link))
        answers, self.sent[:] = list(self.sent), []
        return answers


def offer(run_id: str = "run", *, task: str = "app:task", size: int = SIZE, **fields: Any) -> pb.Offer:
    layout = encode_layout(Layout((Tensor("w", (size,)),)))
    known: dict[str, Any] = {"work": encode_work(Work()), "kind": pb.KIND_TRAIN, "cohort": 1}
    fields = known | {"strategy_name": "fedavg"} | fields
    return pb.Offer(run_id=run_id, task=task, layout=layout, **fields)


def order(round: int = 1, *, kind: WorkKind = "train", model: float = 0.0, size: int = SIZE) -> pb.Order:
    blob = encode_blob(bytes_of(np.full(size, model, np.float32)), inline_bytes=1 << 30)
    return pb.Order(run_id="run", id=encode_order_id(OrderId(kind, round)), model=blob)
