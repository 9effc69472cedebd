"""The shell around one run: feeds events to the sans-IO machine and executes its effects, in order.

One task owns the run: events wait in its queue, so the machine, the aggregate and the strategy's state
have a single writer. What takes long for large models runs on a thread meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedge import federation
from fedge.errors import RunError, StorageError
from fedge.federation import Finish, Plan, RunEffect, RunEvent
from fedge.history import Row
from fedge.learning import Learning
from fedge.pipeline import Update
from fedge.refusal import Refusal, RefusalCode
from fedge.round import (
    Accept,
    Arrived,
    Cancel,
    Close,
    DeadlinePassed,
    Failed,
    GiveUp,
    Joined,
    OrderId,
    Reject,
    Send,
    StartTimer,
)
from fedge.run import RunConfig
from fedge.strategy import AnyStrategy
from fedge.vector import Array, Model
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_order_id
from fedge_server.history import History
from fedge_server.orders import Orders
from fedge_server.shelf import Shelf
from fedge_server.spool import Upload
from fedge_server.waiting import Waiting

log = logging.getLogger(__name__)

_ON_THREAD_BYTES = 1 << 20
MAX_WAITING_EVENTS = 100_000

_NO_VECTOR: Array = np.zeros(0, np.float32)
_ENDED = Refusal(RefusalCode.RUN_ENDED, "the run is over")

Outbox = Callable[[str, pb.ServerMessage], None]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A complete, well-formed update and the future that its sender's receipt waits on."""

    num_examples: int
    metrics: dict[str, float]
    upload: Upload | None
    receipt: asyncio.Future[Refusal | None]


class RunDriver:
    """One run on this coordinator. All methods belong to the event loop's thread."""

    def __init__(
        self, run_id: str, config: RunConfig, strategy: AnyStrategy, model: Model, *, outbox: Outbox
    ) -> None:
        self.run_id = run_id
        self.config = config
        self.strategy = strategy
        self.layout = model.layout
        self.history = History()
        self.shelf = Shelf()
        self.submitted_at = time.time()
        self.run_toml = ""
        self._outbox = outbox
        self._learning = Learning.begin(strategy, model)
        self._orders = Orders(run_id, self.shelf)
        kind = self._learning.order(1).kind
        self.machine, self._first = federation.begin(
            Plan.of(config, kind=kind, max_staleness=strategy.max_staleness)
        )
        self._queue: asyncio.Queue[tuple[RunEvent, Delivery | None]] = asyncio.Queue()
        self._timers: dict[tuple[OrderId, str], asyncio.TimerHandle] = {}
        self._waiting = Waiting()
        self._traffic = _Traffic()
        self._over = False

    @property
    def model(self) -> Model:
        """The model of the last committed round."""
        return self._learning.model

    @property
    def strategy_repr(self) -> str:
        return repr(self.strategy)

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more: the run has ended, or its coordinator shuts down."""
        return self._over

    def post(self, event: RunEvent, delivery: Delivery | None = None) -> None:
        """Hand the run an event; it is handled after those before it."""
        if self._over:
            if delivery is not None:
                _answer(delivery, _ENDED)
            return
        # Only a flood of peers fills the queue; what is lost is the flood's, never a timer or its owner's stop.
        if isinstance(event, Arrived | Failed) and self._queue.qsize() >= MAX_WAITING_EVENTS:
            log.error("run_queue_full run=%s event=%s", self.run_id, type(event).__name__)
            if delivery is not None:
                _answer(delivery, Refusal(RefusalCode.LATE, "the coordinator is overloaded"))
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

    def count(self, *, down: int = 0, up: int = 0) -> None:
        """Account for bytes of vectors on the wire."""
        self._traffic.down += down
        self._traffic.up += up

    async def run(self) -> None:
        """Drive the run to its end. Returns when it is done, failed or stopped."""
        try:
            await self._publish(1)
            await self._execute(self._first, None)
            while self.machine.status == "running":
                event, delivery = await self._queue.get()
                await self._handle(event, delivery)
        except (RunError, StorageError) as error:
            await self._fail(str(error))
        except Exception as error:  # one run's defect must not end the others
            log.exception("run_crashed run=%s", self.run_id)
            await self._fail(f"internal error: {type(error).__name__}: {error}")
        finally:
            self._wind_up()

    async def _fail(self, reason: str) -> None:
        self.machine, effects = federation.fail(self.machine, reason)
        await self._execute(effects, None)

    def _wind_up(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self.shelf.clear()
        self._waiting.clear()
        self._over = True
        clients = set(self.machine.clients)
        while not self._queue.empty():
            event, delivery = self._queue.get_nowait()
            if delivery is not None:
                _answer(delivery, _ENDED)
            if isinstance(event, Joined):  # ready a moment too late
                clients.add(event.client)
        for client in sorted(clients):
            self._outbox(client, self.ended_message())
        self.history.touch()
        log.info(
            "run_ended run=%s status=%s reason=%s", self.run_id, self.machine.status, self.machine.reason
        )

    def ended_message(self) -> pb.ServerMessage:
        return pb.ServerMessage(
            ended=pb.Ended(run_id=self.run_id, status=self.machine.status, reason=self.machine.reason)
        )

    async def _handle(self, event: RunEvent, delivery: Delivery | None) -> None:
        if isinstance(event, Failed):
            self._traffic.refused += 1
            self.history.refusals[event.client] = event.refusal
        waited = self.machine.waiting_for
        self.machine, effects = federation.step(self.machine, event)
        try:
            await self._execute(effects, delivery)
        finally:
            if delivery is not None and not delivery.receipt.done():
                # A defect on the way must not leave the sender waiting.
                _answer(delivery, Refusal(RefusalCode.LATE, "the coordinator could not use this update"))
        if waited != self.machine.waiting_for:
            self.history.touch()

    async def _execute(self, effects: tuple[RunEffect, ...], delivery: Delivery | None) -> None:
        for effect in effects:
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
                        _answer(delivery, refusal)
                case Cancel(client, order):
                    cancel = pb.Cancel(run_id=self.run_id, id=encode_order_id(order))
                    self._outbox(client, pb.ServerMessage(cancel=cancel))
                    self.shelf.withdraw(client, order.kind)
                case StartTimer(order, phase, seconds):
                    self._start_timer(DeadlinePassed(order, phase), seconds)
                case Close(order, _):
                    await self._close(order)
                case GiveUp(order, reason):
                    log.warning("round_given_up run=%s order=%s reason=%s", self.run_id, order, reason)
                    self._waiting.drop(order.kind)
                    self._learning = self._learning.abandon(order)
                    self._drop_timers(order)
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
        full = self._waiting.add(order.kind, update, upload)
        self._traffic.up += upload.size if upload is not None else 0
        self.shelf.withdraw(client, order.kind)
        self.history.refusals.pop(client, None)
        _answer(delivery, None)
        if full:
            with self._waiting.taken(order.kind) as updates:
                size = self._bytes_of(order)
                self._learning = await _off_loop(size, self._learning.fold, order, *updates)

    def _bytes_of(self, order: OrderId) -> int:
        """What one update for an order measures."""
        return 0 if order.kind == "evaluate" else self.layout.nbytes

    async def _close(self, order: OrderId) -> None:
        self._drop_timers(order)
        with self._waiting.taken(order.kind) as updates:
            size = self._bytes_of(order)
            self._learning, aggregate = await _off_loop(size, self._learning.close, order, *updates)
        if order.kind == "evaluate":
            self.history.add_metrics(order.round, aggregate.metrics)
            return
        await self._publish(order.round + 1)
        traffic = self._traffic.end(order)
        log.info(
            "round_committed run=%s round=%d clients=%d seconds=%.3f",
            self.run_id,
            order.round,
            len(aggregate.clients),
            traffic.seconds,
        )
        self.history.add(
            Row(
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
        )

    async def _publish(self, round: int) -> None:
        """Encode and hash the model that `round` begins with once, for all who will fetch it."""
        order = self._learning.order(round)
        vector = self._learning.model.vector
        await _off_loop(vector.nbytes, self._orders.publish, vector, order)

    def _start_timer(self, event: DeadlinePassed, seconds: float) -> None:
        key = (event.order, event.phase)
        if key in self._timers:
            self._timers[key].cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self.post, event)

    def _drop_timers(self, order: OrderId) -> None:
        for key in [key for key in self._timers if key[0] == order]:
            self._timers.pop(key).cancel()


class _Traffic:
    """Bytes, refusals and seconds since the last committed round."""

    def __init__(self) -> None:
        self.down = self.up = self.refused = 0
        self.seconds = 0.0
        self._began: float | None = None

    def begin(self, order: OrderId) -> None:
        if order.kind != "evaluate" and self._began is None:
            self._began = time.monotonic()

    def end(self, order: OrderId) -> _Traffic:
        """What the committed round took; counting starts again at zero."""
        done = _Traffic()
        done.down, done.up, done.refused = self.down, self.up, self.refused
        done.seconds = time.monotonic() - self._began if self._began is not None else 0.0
        self.down = self.up = self.refused = 0
        self._began = None
        return done


def _answer(delivery: Delivery, refusal: Refusal | None) -> None:
    if not delivery.receipt.done():
        delivery.receipt.set_result(refusal)
    if refusal is not None and delivery.upload is not None:
        delivery.upload.close()


async def _off_loop(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Small work at once (a thread's hand-over would cost more), large work on a thread."""
    if size <= _ON_THREAD_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
