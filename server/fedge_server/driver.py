"""The shell around one run: feeds events to the sans-IO machine and executes its effects, in order.

One task owns the run: events wait in its queue, so the machine, the aggregate and the strategy's state
have a single writer. What takes long for large models runs on a thread meanwhile. Between two events the
run may be kept, so that the next process goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fedge import federation, progress
from fedge.errors import LinkError, RunError, StorageError
from fedge.events import (
    Accept,
    Arrived,
    Cancel,
    Close,
    DeadlinePassed,
    Failed,
    GiveUp,
    Joined,
    Left,
    OrderId,
    Progressed,
    Reject,
    Send,
    StartTimer,
)
from fedge.history import Row
from fedge.learning import Learning
from fedge.pipeline import Aggregate, Update
from fedge.plan import Plan
from fedge.privacy.central import Central
from fedge.privacy.secure import KEY_BYTES, SecureSource
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.run_state import Finish, Returned, RunEffect, RunEvent
from fedge.strategy import AnyStrategy
from fedge.vector import Array, Model
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_order_id
from fedge_server.archive import Archive, Moment
from fedge_server.history import History
from fedge_server.keeper import Keeper
from fedge_server.moments import Start, moment_of
from fedge_server.orders import Orders
from fedge_server.receipts import Delivery
from fedge_server.shelf import Shelf
from fedge_server.spool import Upload
from fedge_server.store.records import RunRecord
from fedge_server.timers import Timers
from fedge_server.traffic import Traffic
from fedge_server.waiting import Accepted, Waiting

log = logging.getLogger(__name__)

_ON_THREAD_BYTES = 1 << 20
MAX_WAITING_EVENTS = 100_000
REJOIN_S = 60.0
"""How long the clients of a run count as present when the coordinator has started again."""

_NO_VECTOR: Array = np.zeros(0, np.float32)
_ENDED = Refusal(RefusalCode.RUN_ENDED, "the run is over")

Outbox = Callable[[str, pb.ServerMessage], None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run needs of its coordinator: how to reach clients, and where to keep itself."""

    outbox: Outbox
    archive: Archive
    max_kept_bytes: int = 64 << 30


class RunDriver:
    """One run on this coordinator. All methods belong to the event loop's thread."""

    def __init__(
        self, record: RunRecord, config: RunConfig, start: Start, surroundings: Surroundings
    ) -> None:
        self.run_id = record.run_id
        self.record = record
        self.config = config
        self.layout = start.learning.layout
        self.history = History(list(start.rows))
        self.shelf = Shelf()
        self.machine = start.machine
        self.keeper = Keeper(surroundings.archive, config.checkpoint, committed=start.machine.committed)
        self._first = start.effects
        self._learning = start.learning
        # Noise of the coordinator's own, where it is to add some: its key is this process's, and goes with it.
        self._source = (
            SecureSource(secrets.token_bytes(KEY_BYTES)) if start.learning.central is not None else None
        )
        self._outbox = surroundings.outbox
        self._reach = surroundings.archive.faults.reach
        self._orders = Orders(record.run_id, self.shelf)
        self._queue: asyncio.Queue[tuple[RunEvent | None, Delivery | None]] = asyncio.Queue()
        self._timers = Timers(self.post)
        self._waiting = Waiting(surroundings.max_kept_bytes)
        for accepted in start.accepted:
            self._waiting.add(accepted)
        self._expected = set(start.machine.clients)
        self._traffic = Traffic()
        self._changed = False
        self._kept_revision = self.history.revision
        self._nudge: asyncio.TimerHandle | None = None
        self._draining = False
        self._over = False

    @classmethod
    def begin(
        cls,
        record: RunRecord,
        config: RunConfig,
        strategy: AnyStrategy,
        model: Model,
        surroundings: Surroundings,
    ) -> RunDriver:
        """A new run. It is not kept yet: see `first_moment`."""
        learning = Learning.begin(strategy, model, Central.of(config))
        kind = learning.order(1).kind
        plan = Plan.of(config, kind=kind, max_staleness=strategy.max_staleness)
        machine, effects = federation.begin(plan)
        return cls(record, config, Start(learning, machine, effects), surroundings)

    def first_moment(self) -> Moment:
        """The run before its first event, with the initial model."""
        return moment_of(self.run_id, self.machine, self._learning)

    @property
    def model(self) -> Model:
        """The model of the last committed round."""
        return self._learning.model

    @property
    def waiting_for(self) -> str:
        """Why nothing moves, in words; empty while something does."""
        if self.keeper.trouble:
            return f"the coordinator cannot keep this run, and goes on when it can: {self.keeper.trouble}"
        return self.machine.waiting_for

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more: the run has ended, or its coordinator shuts down."""
        return self._over

    def join(self, client: str) -> None:
        """A client is ready for this run."""
        back = client in self._expected
        self._expected.discard(client)
        self.post(Returned(client) if back else Joined(client))

    def leave(self, client: str) -> None:
        """A client's link is gone, or it does not want to take part any more."""
        self._expected.discard(client)
        self.post(Left(client))

    def drain(self) -> None:
        """End after the event that is being handled, with everything kept: the next process goes on."""
        self._draining = True
        self._queue.put_nowait((None, None))

    def post(self, event: RunEvent, delivery: Delivery | None = None) -> None:
        """Hand the run an event; it is handled after those before it."""
        if self._over:
            if delivery is not None:
                delivery.answer(_ENDED)
            return
        # Only a flood of peers fills the queue; what is lost is the flood's, never a timer or its owner's stop.
        if isinstance(event, Arrived | Failed | Progressed) and self._queue.qsize() >= MAX_WAITING_EVENTS:
            log.error("run_queue_full run=%s event=%s", self.run_id, type(event).__name__)
            if delivery is not None:
                delivery.answer(Refusal(RefusalCode.LATE, "the coordinator is overloaded"))
            return
        self._queue.put_nowait((event, delivery))

    async def deliver(
        self, client: str, order: OrderId, update: pb.Update, upload: Upload | None
    ) -> Refusal | None:
        """Hand in a checked update; returns None once it counts, or why it does not. The upload is the run's."""
        receipt: asyncio.Future[Refusal | None] = asyncio.get_running_loop().create_future()
        metrics = {metric.name: metric.value for metric in update.metrics}
        self.post(Arrived(client, order), Delivery(update.num_examples, metrics, upload, receipt))
        return await receipt

    def unwanted(self, client: str, order: OrderId) -> Refusal | None:
        """Why an update would be refused whatever it holds, known before its bytes are read."""
        machine, effects = federation.step(self.machine, Arrived(client, order))
        refusal = next((effect.refusal for effect in effects if isinstance(effect, Reject)), None)
        if refusal is not None and machine != self.machine:
            self.post(Arrived(client, order))  # the sender of a stale gradient is given the current model
        return refusal

    @property
    def progress_every_s(self) -> float:
        """How often it is worth telling this run of progress."""
        return progress.every_s(self.config.cohort.deadline_s)

    def progressed(self, client: str, order: OrderId, permille: int) -> None:
        """A client's work on an order has come so far, as `fedge.progress` counts it."""
        if 0 < permille <= progress.ALL:
            self.post(Progressed(client, order, permille))

    def fetching(self, client: str, done: int, size: int) -> None:
        """A client is fetching what its orders name: so much of it is on its way."""
        for order, cohort in self.machine.cohorts.items():
            if cohort.get(client) in ("pending", "lost"):
                self.progressed(client, order, progress.fetched(done, size))

    def count(self, *, down: int = 0, up: int = 0) -> None:
        """Account for bytes of vectors on the wire."""
        self._traffic.down += down
        self._traffic.up += up

    async def run(self) -> None:
        """Drive the run to its end, or until it is drained."""
        rejoin = asyncio.get_running_loop().call_later(REJOIN_S, self._give_up_waiting)
        try:
            await self._publish(self.machine.committed + 1)
            await self._execute(self._first, None)
            while self.machine.status == "running" and not self._draining:
                self._keep_if_due()
                event, delivery = await self._queue.get()
                if self.keeper.trouble:  # what comes now could not be kept: it waits
                    await self.keeper.settled()
                if event is not None:
                    await self._handle(event, delivery)
        except (RunError, StorageError) as error:
            await self._fail(str(error))
        except Exception as error:  # one run's defect must not end the others
            log.exception("run_crashed run=%s", self.run_id)
            await self._fail(f"internal error: {type(error).__name__}: {error}")
        finally:
            rejoin.cancel()
            try:
                await self._keep_to_the_end()
            finally:
                self._wind_up()

    def _give_up_waiting(self) -> None:
        """Clients that counted as present since the coordinator started again, and have not come: they are gone."""
        for client in sorted(self._expected):
            log.warning("client_not_back run=%s client=%s", self.run_id, client)
            self.leave(client)

    def _keep_if_due(self) -> None:
        """Between two events: begin to keep this moment, or see to it that it will be thought of in time."""
        if not self._changed:
            return
        due_in_s = self.keeper.due_in_s(self.machine.committed)
        if due_in_s is None:
            return  # another moment is being kept; the end of that is an event
        if due_in_s == 0:
            self._keep()
        elif self._nudge is None:
            loop = asyncio.get_running_loop()
            self._nudge = loop.call_later(due_in_s, self._wake)

    def _wake(self) -> None:
        self._nudge = None
        self._queue.put_nowait((None, None))

    def _keep(self, learning: Learning | None = None, row: Row | None = None) -> None:
        """Begin to keep this moment; with these in it, if they are not the run's yet."""
        if self._nudge is not None:
            self._nudge.cancel()
            self._nudge = None
        unkept, revision = self._waiting.unkept(), self.history.revision

        def kept() -> None:
            self._waiting.were_kept(unkept)
            self._kept_revision = revision
            self._queue.put_nowait((None, None))

        self._changed = False
        changed = {each.round: each for each in self.history.since(self._kept_revision)}
        if row is not None:
            changed[row.round] = row
        committed = self.machine.committed > self.keeper.committed
        newest = learning if learning is not None else self._learning
        moment = moment_of(
            self.run_id,
            self.machine,
            newest if committed else None,
            rows=list(changed.values()),
            accepted=unkept,
        )
        self.keeper.keep(moment, kept)

    async def _keep_to_the_end(self) -> None:
        """Keep the last moment, however long that takes."""
        await self.keeper.settled()
        if self._changed or self.machine.status != "running":
            self._keep()
            await self.keeper.settled()

    async def _fail(self, reason: str) -> None:
        self.machine, effects = federation.fail(self.machine, reason)
        await self._execute(effects, None)

    def _wind_up(self) -> None:
        self._timers.clear()
        self.shelf.clear()
        self._waiting.clear()
        self.keeper.stop()
        if self._nudge is not None:
            self._nudge.cancel()
        self._over = True
        if self.machine.status == "running":
            self._leave_to_the_next_process()
            return
        clients = set(self.machine.clients)
        while not self._queue.empty():
            event, delivery = self._queue.get_nowait()
            if delivery is not None:
                delivery.answer(_ENDED)
            if isinstance(event, Joined | Returned):  # ready a moment too late
                clients.add(event.client)
        for client in sorted(clients):
            self._outbox(client, self.ended_message())
        self.history.touch()
        log.info(
            "run_ended run=%s status=%s reason=%s", self.run_id, self.machine.status, self.machine.reason
        )

    def _leave_to_the_next_process(self) -> None:
        while not self._queue.empty():
            _, delivery = self._queue.get_nowait()
            if delivery is not None:
                delivery.leave(LinkError("the coordinator is shutting down"))
        self.history.touch()
        log.info("run_interrupted run=%s round=%d", self.run_id, self.machine.committed)

    def ended_message(self) -> pb.ServerMessage:
        return pb.ServerMessage(
            ended=pb.Ended(run_id=self.run_id, status=self.machine.status, reason=self.machine.reason)
        )

    async def _handle(self, event: RunEvent, delivery: Delivery | None) -> None:
        if isinstance(event, Failed):
            self._traffic.refused += 1
            self.history.refusals[event.client] = event.refusal
        self._reach("event.before")
        waited = self.machine.waiting_for
        self._changed = True
        self.machine, effects = federation.step(self.machine, event)
        try:
            await self._execute(effects, delivery)
        finally:
            if delivery is not None and not delivery.receipt.done():
                # A defect on the way must not leave the sender waiting.
                delivery.answer(Refusal(RefusalCode.LATE, "the coordinator could not use this update"))
        if waited != self.machine.waiting_for:
            self.history.touch()

    async def _execute(self, effects: tuple[RunEffect, ...], delivery: Delivery | None) -> None:
        for effect in effects:
            name = type(effect).__name__.lower()
            self._reach(f"effect.{name}.before")
            await self._do(effect, delivery)
            self._reach(f"effect.{name}.after")

    async def _do(self, effect: RunEffect, delivery: Delivery | None) -> None:
        match effect:
            case Send(client, order):
                self._send(client, order)
            case Accept(client, order, staleness):
                assert delivery is not None  # an Accept answers an Arrived, which carries one
                await self._take(client, order, staleness, delivery)
            case Reject(client, order, refusal):
                self._traffic.refused += 1
                log.info(
                    "update_refused run=%s client=%s order=%s reason=%s",
                    self.run_id,
                    client,
                    order,
                    refusal,
                )
                if delivery is not None:
                    delivery.answer(refusal)
            case Cancel(client, order):
                cancel = pb.Cancel(run_id=self.run_id, id=encode_order_id(order))
                self._outbox(client, pb.ServerMessage(cancel=cancel))
                self.shelf.withdraw(client, order.kind)
            case StartTimer(order, phase, seconds):
                self._timers.start(DeadlinePassed(order, phase), seconds)
            case Close(order, _):
                await self._close(order)
            case GiveUp(order, reason):
                log.warning("round_given_up run=%s order=%s reason=%s", self.run_id, order, reason)
                self._waiting.drop(order.kind)
                self._learning = self._learning.abandon(order)
                self._timers.drop(order)
            case Finish():
                pass  # `run` sees the machine's status

    def _send(self, client: str, order: OrderId) -> None:
        message = self._orders.message(order, deadline_s=self.config.cohort.deadline_s)
        self._traffic.begin(order)
        self._traffic.down += self._orders.inline_bytes
        self.shelf.grant(client, order.kind)
        self._outbox(client, message)

    async def _take(self, client: str, order: OrderId, staleness: int, delivery: Delivery) -> None:
        upload = delivery.upload
        vector = upload if upload is not None else _NO_VECTOR
        update = Update(client, vector, delivery.num_examples, delivery.metrics, staleness)
        full = self._waiting.add(Accepted(order, update, upload))
        self._traffic.up += upload.size if upload is not None else 0
        self.shelf.withdraw(client, order.kind)
        self.history.refusals.pop(client, None)
        delivery.answer(None)
        if full:
            with self._waiting.taken(order.kind) as updates:
                size = self._bytes_of(order)
                self._learning = await _off_loop(size, self._learning.fold, order, *updates)

    def _bytes_of(self, order: OrderId) -> int:
        """What one update for an order measures."""
        return 0 if order.kind == "evaluate" else self.layout.nbytes

    async def _close(self, order: OrderId) -> None:
        self._timers.drop(order)
        with self._waiting.taken(order.kind) as updates:
            close = partial(self._learning.close, order, *updates, source=self._source)
            learning, aggregate = await _off_loop(self._bytes_of(order), close)
        self._waiting.drop(order.kind)
        row = None
        if self._source is not None:
            row = self._row(order, aggregate)
            await self._keep_first(learning, row)
        self._learning = learning
        if order.kind != "evaluate":
            await self._publish(order.round + 1)
        self.history.put(row if row is not None else self._row(order, aggregate))

    async def _keep_first(self, learning: Learning, row: Row) -> None:
        """Nothing is told of an aggregate with noise before it is certain that it is not made again with other
        noise: two of them would hide less than one."""
        await self.keeper.settled()
        self._keep(learning, row)
        await self.keeper.settled()

    def _row(self, order: OrderId, aggregate: Aggregate) -> Row:
        if order.kind == "evaluate":
            return self.history.evaluated(order.round, aggregate.metrics)
        traffic = self._traffic.end(order)
        log.info(
            "round_committed run=%s round=%d clients=%d seconds=%.3f",
            self.run_id,
            order.round,
            len(aggregate.clients),
            traffic.seconds,
        )
        return Row(
            round=order.round,
            attempt=order.attempt,
            clients=aggregate.clients,
            num_examples=aggregate.num_examples,
            seconds=traffic.seconds,
            bytes_down=traffic.down,
            bytes_up=traffic.up,
            refused=traffic.refused,
            staleness=aggregate.staleness,
            metrics=aggregate.metrics,
        )

    async def _publish(self, round: int) -> None:
        """Encode and hash the model that `round` begins with once, for all who will fetch it."""
        order = self._learning.order(round)
        vector = self._learning.model.vector
        await _off_loop(vector.nbytes, self._orders.publish, vector, order)


async def _off_loop(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Small work at once (a thread's hand-over would cost more), large work on a thread."""
    if size <= _ON_THREAD_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
