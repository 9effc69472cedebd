"""The shell around one run: feeds events to the sans-IO machine and executes its effects, in order.

One task owns the run: events wait in its queue, so the machine, the aggregate and the strategy's state
have a single writer. What takes long for large models runs on a thread meanwhile. Between two events the
run may be kept, so that the next process goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import numpy as np

from fedge import federation, progress
from fedge.errors import LinkError, RefusedError, RunError, StorageError
from fedge.events import (
    Advertised,
    Arrived,
    Consented,
    Failed,
    Joined,
    Left,
    OrderId,
    Progressed,
    Reject,
    Revealed,
    Shared,
)
from fedge.history import Row
from fedge.learning import Learning
from fedge.plan import Plan
from fedge.privacy.central import Central
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.run_state import Returned, RunEffect, RunEvent
from fedge.secagg.terms import SumTerms
from fedge.strategy import AnyStrategy
from fedge.vector import Array, Model
from fedge.wire import fedge_pb2 as pb
from fedge_server.archive import Archive, Moment
from fedge_server.execution import Execution
from fedge_server.history import History
from fedge_server.keeper import Keeper
from fedge_server.moments import Start, moment_of
from fedge_server.offers import offer_of
from fedge_server.receipts import Delivery
from fedge_server.shelf import Shelf
from fedge_server.spool import Upload
from fedge_server.store.records import RunRecord
from fedge_server.summing import Keys, Outbox, Summing
from fedge_server.timers import Timers

log = logging.getLogger(__name__)

_ON_THREAD_BYTES = 1 << 20
MAX_WAITING_EVENTS = 100_000
REJOIN_S = 60.0
"""How long the clients of a run count as present when the coordinator has started again."""

_NO_VECTOR: Array = np.zeros(0, np.float32)
_ENDED = Refusal(RefusalCode.RUN_ENDED, "the run is over")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run needs of its coordinator: how to reach clients, where to keep itself, and whose keys are whose."""

    outbox: Outbox
    archive: Archive
    keys: Keys
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
        secure = SumTerms.of(config, start.learning.strategy, start.learning.layout)
        kind, strategy = start.machine.plan.kind, record.strategy
        self.offer = offer_of(record.run_id, config, self.layout, kind=kind, strategy=strategy, secure=secure)
        self._summing: Summing | None = None
        if secure is not None:
            self._summing = Summing(
                secure,
                self.offer,
                self.layout,
                surroundings.keys,
                surroundings.outbox,
                self.post,
                divisor=config.cohort.size if secure.noise is not None else None,
            )
        self._first = start.effects
        self._outbox = surroundings.outbox
        self._reach = surroundings.archive.faults.reach
        self._queue: asyncio.Queue[tuple[RunEvent | None, Delivery | None]] = asyncio.Queue()
        self._timers = Timers(self.post)
        self._execution = Execution(
            self.run_id,
            start,
            deadline_s=config.cohort.deadline_s,
            outbox=surroundings.outbox,
            timers=self._timers,
            shelf=self.shelf,
            personal=bool(config.work.personal),
            history=self.history,
            summing=self._summing,
            max_kept_bytes=surroundings.max_kept_bytes,
            keep_first=self._keep_first,
            kept=lambda: self.keeper.committed,
        )
        self._expected = set(start.machine.clients)
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
        secure = SumTerms.of(config, strategy, model.layout)
        plan = Plan.of(
            config,
            kind=kind,
            max_staleness=strategy.max_staleness,
            secure=secure.of_round(config.secure_aggregation.exchange_s) if secure is not None else None,
        )
        machine, effects = federation.begin(plan)
        return cls(record, config, Start(learning, machine, effects), surroundings)

    def first_moment(self) -> Moment:
        """The run before its first event, with the initial model."""
        return moment_of(self.run_id, self.machine, self._execution.learning)

    @property
    def model(self) -> Model:
        """The model of the last committed round."""
        return self._execution.learning.model

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
        delivery = Delivery(update.num_examples, metrics, upload, receipt, update.proof)
        self.post(Arrived(client, order), delivery)
        return await receipt

    def hear(self, client: str, message: pb.ClientMessage) -> None:
        """A client's message in a secure sum. One that nobody waits for is dropped."""
        if self._summing is None or self._over:
            return
        event = self._summing.event(client, message)
        if event is not None and federation.step(self.machine, event)[0] != self.machine:
            self._summing.hear(event, message)

    def update_bytes(self, order: OrderId) -> int:
        """What an update for an order measures."""
        return self._execution.update_bytes(order)

    @property
    def masked(self) -> bool:
        """Whether updates come masked, and are of use in their sum alone."""
        return self._summing is not None

    def check_masked(self, client: str, order: OrderId, update: pb.Update) -> None:
        """Check that an update comes masked if all of this run's do.

        Raises:
            RefusedError: it should, and does not; or it should not, and does.
        """
        if self._summing is not None:
            self._summing.check(client, order, update)
        elif update.HasField("proof"):
            raise RefusedError(
                Refusal(RefusalCode.NOT_ASKED, "expected an update as it is, found a masked one")
            )

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
        self._execution.traffic.down += down
        self._execution.traffic.up += up

    async def run(self) -> None:
        """Drive the run to its end, or until it is drained."""
        rejoin = asyncio.get_running_loop().call_later(REJOIN_S, self._give_up_waiting)
        try:
            await self._execution.publish(self.machine.committed + 1)
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
        unkept, revision = self._execution.waiting.unkept(), self.history.revision

        def kept() -> None:
            self._execution.waiting.were_kept(unkept)
            self._kept_revision = revision
            self._queue.put_nowait((None, None))

        self._changed = False
        changed = {each.round: each for each in self.history.since(self._kept_revision)}
        if row is not None:
            changed[row.round] = row
        committed = self.machine.committed > self.keeper.committed
        newest = learning if learning is not None else self._execution.learning
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
        self._execution.stop()
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
        if isinstance(event, Advertised | Shared | Consented | Revealed):
            assert self._summing is not None  # else it was not heard
            event = self._summing.take(event, wanted=federation.step(self.machine, event)[0] != self.machine)
        if isinstance(event, Failed):
            self._execution.traffic.refused += 1
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
            await self._execution.do(effect, delivery, self.machine)
            self._reach(f"effect.{name}.after")

    async def _keep_first(self, learning: Learning, row: Row) -> None:
        """Nothing is told of an aggregate with noise before it is certain that it is not made again with other
        noise: two of them would hide less than one. A secure sum cannot be made again at all."""
        await self.keeper.settled()
        self._keep(learning, row)
        await self.keeper.settled()
