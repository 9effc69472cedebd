"""What a run does when its machine says so: orders go out, updates are summed, rounds are closed.

The driver calls it effect by effect, in order; what takes long for large models runs on a thread meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np

from fedge.events import (
    Accept,
    Cancel,
    Close,
    DeadlinePassed,
    Disclose,
    Enlist,
    GiveUp,
    Mask,
    OrderId,
    Reject,
    Remind,
    Send,
    StartTimer,
    Survive,
    Unmask,
)
from fedge.history import Row
from fedge.learning import Learning
from fedge.pipeline import Aggregate, Update
from fedge.privacy.secure import KEY_BYTES, SecureSource
from fedge.refusal import Refusal
from fedge.run_state import Federation, Finish, RunEffect
from fedge.variates import Settled
from fedge.vector import Array
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_order_id
from fedge_server.history import History
from fedge_server.moments import Start
from fedge_server.orders import Orders
from fedge_server.receipts import Delivery
from fedge_server.shelf import Shelf
from fedge_server.summing import Outbox, Summing
from fedge_server.timers import Timers
from fedge_server.traffic import Traffic
from fedge_server.waiting import Accepted, Waiting

log = logging.getLogger(__name__)

_ON_THREAD_BYTES = 1 << 20
_NO_VECTOR: Array = np.zeros(0, np.float32)

KeepFirst = Callable[[Learning, Row], Awaitable[None]]


class Execution:
    """One run's. `personal`: its clients have layers of their own. `keep_first` keeps what a round has made before
    anybody is told of it; `kept` says up to which round all is."""

    def __init__(
        self,
        run_id: str,
        start: Start,
        *,
        deadline_s: float,
        outbox: Outbox,
        timers: Timers,
        shelf: Shelf,
        personal: bool,
        history: History,
        summing: Summing | None,
        max_kept_bytes: int,
        keep_first: KeepFirst,
        kept: Callable[[], int],
    ) -> None:
        self.learning = start.learning
        self.traffic = Traffic()
        self.waiting = Waiting(max_kept_bytes)
        for accepted in start.accepted:
            self.waiting.add(accepted)
        self._run_id = run_id
        self._deadline_s = deadline_s
        self._outbox = outbox
        self._timers = timers
        self._shelf = shelf
        self._history = history
        self._summing = summing
        self._keep_first = keep_first
        self._kept = kept
        self._counted = {name: (row.round, row.attempt) for row in start.rows for name in row.clients}
        self._orders = Orders(run_id, shelf, personal=personal)
        # Noise of the coordinator's own, where it is to add some: its key is this process's, and goes with it.
        self._source = (
            SecureSource(secrets.token_bytes(KEY_BYTES)) if start.learning.central is not None else None
        )

    async def publish(self, round: int) -> None:
        """Encode and hash the model that `round` begins with once, for all who will fetch it."""
        order, vector = self.learning.order(round), self.learning.vector
        await _off_loop(vector.nbytes, self._orders.publish, vector, order)

    def update_bytes(self, order: OrderId) -> int:
        """What an update for an order measures."""
        if self._summing is not None:
            return self._summing.update_bytes(order)
        return 0 if order.kind == "evaluate" else self.learning.layout.nbytes

    def stop(self) -> None:
        """The run is over in this process."""
        self.waiting.clear()
        if self._summing is not None:
            self._summing.stop()

    async def do(self, effect: RunEffect, delivery: Delivery | None, machine: Federation) -> None:
        """Do one of the effects of the machine's last step, after which it is `machine`."""
        match effect:
            case Send(client, order):
                await self._send(client, order)
            case Accept(client, order, staleness):
                assert delivery is not None  # an Accept answers an Arrived, which carries one
                await self._take(client, order, staleness, delivery)
            case Reject(client, order, refusal):
                self._reject(client, order, refusal, delivery)
            case Cancel(client, order):
                cancel = pb.Cancel(run_id=self._run_id, id=encode_order_id(order))
                self._outbox(client, pb.ServerMessage(cancel=cancel))
                self._shelf.withdraw(client, order.kind)
            case StartTimer(order, phase, seconds):
                self._timers.start(DeadlinePassed(order, phase), seconds)
            case Close(order, _):
                await self._close(order)
            case GiveUp(order, reason):
                self._give_up(order, reason, skipped=machine.committed == order.round)
            case Enlist() | Mask() | Remind() | Survive() | Disclose() | Unmask():
                assert self._summing is not None  # only such rounds want it
                self._summing.do(effect)
            case Finish():
                pass  # the driver sees the machine's status

    async def _send(self, client: str, order: OrderId) -> None:
        message = self._orders.message(order, deadline_s=self._deadline_s)
        if self._summing is not None:
            await self._summing.begin(order, message.order)
        self.traffic.begin(order)
        self.traffic.down += self._orders.inline_bytes(order.kind)
        self._shelf.grant(client, order.kind)
        if message.order.HasField("control"):
            message = self._orders.with_settled(message, Settled(self._kept(), self._counted.get(client)))
        self._outbox(client, message)

    def _reject(self, client: str, order: OrderId, refusal: Refusal, delivery: Delivery | None) -> None:
        self.traffic.refused += 1
        log.info("update_refused run=%s client=%s order=%s reason=%s", self._run_id, client, order, refusal)
        if delivery is not None:
            delivery.answer(refusal)

    async def _take(self, client: str, order: OrderId, staleness: int, delivery: Delivery) -> None:
        upload = delivery.upload
        self.traffic.up += upload.size if upload is not None else 0
        self._shelf.withdraw(client, order.kind)
        self._history.refusals.pop(client, None)
        if self._summing is not None:
            # Not kept: no other process could go on with this sum.
            assert upload is not None  # every masked update has bytes
            await _off_loop(upload.size, self._summing.add, client, order, delivery.proof, upload)
            delivery.answer(None)
            upload.close()
            return
        vector = upload if upload is not None else _NO_VECTOR
        update = Update(client, vector, delivery.num_examples, delivery.metrics, staleness)
        full = self.waiting.add(Accepted(order, update, upload))
        delivery.answer(None)
        if full and self.learning.streams(order):
            with self.waiting.taken(order.kind) as updates:
                fold = partial(self.learning.fold, order, *updates)
                self.learning = await _off_loop(self.update_bytes(order), fold)

    async def _close(self, order: OrderId) -> None:
        self._timers.drop(order)
        with self.waiting.taken(order.kind) as updates:
            close = partial(self.learning.close, order, *updates, source=self._source)
            if self._summing is not None:
                close = partial(
                    self.learning.close_with, order, self._summing.close(order), source=self._source
                )
            learning, aggregate = await _off_loop(self.update_bytes(order), close)
        self.waiting.drop(order.kind)
        row = None
        if self._source is not None or self._summing is not None:
            row = self._row(order, aggregate)
            await self._keep_first(learning, row)
        self.learning = learning
        if order.kind != "evaluate":
            self._counted |= dict.fromkeys(aggregate.clients, (order.round, order.attempt))
            await self.publish(order.round + 1)
        self._history.put(row if row is not None else self._row(order, aggregate))

    def _give_up(self, order: OrderId, reason: str, *, skipped: bool) -> None:
        log.warning("round_given_up run=%s order=%s reason=%s", self._run_id, order, reason)
        self.waiting.drop(order.kind)
        self.learning = self.learning.abandon(order)
        self._timers.drop(order)
        if self._summing is not None:
            self._summing.drop(order)
        if order.kind != "evaluate" and skipped:  # it is spent: the run goes on without it
            log.warning("round_skipped run=%s round=%d", self._run_id, order.round)
            self._history.put(self.traffic.row(order, Aggregate(_NO_VECTOR, (), 0)))

    def _row(self, order: OrderId, aggregate: Aggregate) -> Row:
        if order.kind == "evaluate":
            return self._history.evaluated(order.round, aggregate.metrics)
        row = self.traffic.row(order, aggregate)
        log.info(
            "round_committed run=%s round=%d clients=%d seconds=%.3f",
            *(self._run_id, order.round, len(row.clients), row.seconds),
        )
        return row


async def _off_loop(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Small work at once (a thread's hand-over would cost more), large work on a thread."""
    if size <= _ON_THREAD_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
