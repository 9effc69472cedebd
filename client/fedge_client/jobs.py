"""What the agent does for a run, one job at a time: look at an offer, do an order, hand in the update."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedge.errors import FedgeError, LinkError, RefusedError, RemoteProtocolError, StorageError
from fedge.events import OrderId
from fedge.faults import Faults
from fedge.refusal import Refusal, RefusalCode
from fedge.strategy import WorkKind
from fedge.variates import Settled, unsuited
from fedge.vector import Array, bytes_of, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.agreed import order_digest
from fedge.wire.codec import (
    decode_order_id,
    decode_refusal,
    decode_settled,
    encode_metrics,
    encode_order_id,
    encode_refusal,
    printable,
)
from fedge.wire.limits import INLINE_BYTES
from fedge_client import pipe_pb2 as pipe
from fedge_client.admission import Request, admit
from fedge_client.gate import Released
from fedge_client.holding import Holding
from fedge_client.link import Link
from fedge_client.outbox import Lost, Outbox, Prepared
from fedge_client.participation import Participation, Unmasked
from fedge_client.performing import Performer
from fedge_client.protection import Protection
from fedge_client.secure_sessions import SecureSessions
from fedge_client.settings import ClientSettings
from fedge_client.spending import Spending
from fedge_client.supervisor import Supervisor
from fedge_client.transfer import Transfers
from fedge_client.variates import Variates

log = logging.getLogger(__name__)

OUTBOX = "outbox"
VARIATES = "variates"
_ON_THREAD_BYTES = 1 << 20

Send = Callable[[pb.ClientMessage], None]


class Jobs:
    """The site's runs. Every answer goes out through `send`; refusals never end the agent."""

    def __init__(
        self,
        settings: ClientSettings,
        folder: Path,
        supervisor: Supervisor,
        spending: Spending,
        sessions: SecureSessions,
        send: Send,
        faults: Faults | None = None,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._supervisor = supervisor
        self._spending = spending
        self._sessions = sessions
        self._send = send
        self._outbox = Outbox(folder / OUTBOX, max_runs=settings.policy.max_runs)
        self._reach = (faults or Faults()).reach
        self._transfers = Transfers()
        self._variates = Variates(folder / VARIATES, max_runs=settings.policy.max_runs)
        self._performer = Performer(settings.policy, supervisor, spending, self._variates, send, self._reach)
        self.runs: dict[str, Participation] = {}
        self._offered: set[str] = set()

    def new_session(self) -> None:
        """From now on the coordinator offers every open run again: one that it does not is over."""
        self._offered.clear()

    def accept_again(self, run_id: str) -> bool:
        """Accept a run that this site takes part in already; False if it does not."""
        if run_id not in self.runs:
            return False
        self._offered.add(run_id)
        self._send(pb.ClientMessage(accept=pb.Accept(run_id=run_id)))
        return True

    async def consider(self, offer: pb.Offer) -> None:
        """Accept or refuse a run; to accept is to have its task, data and model ready."""
        if self.accept_again(offer.run_id):
            return
        try:
            participation = await self._join(offer)
        except FedgeError as error:
            refusal = _refusal_of(error, RefusalCode.TASK_UNAVAILABLE)
            why = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            log.warning("run_refused run=%s reason=%s", printable(offer.run_id)[:100], why)
            refuse = pb.Refuse(run_id=offer.run_id, refusal=encode_refusal(refusal))
            self._send(pb.ClientMessage(refuse=refuse))
            return
        self.runs[offer.run_id] = participation
        self._offered.add(offer.run_id)
        log.info(
            "run_joined run=%s task=%s parameters=%d", offer.run_id, offer.task, participation.layout.size
        )
        self._send(pb.ClientMessage(accept=pb.Accept(run_id=offer.run_id)))
        self._reach("job.joined")

    async def _join(self, offer: pb.Offer) -> Participation:
        request, policy = Request.of(offer), self._settings.policy
        log.info("run_offered run=%s asked=%s", printable(request.run_id), printable(request.in_words()))
        admit(policy, request, folder=self._folder / self._settings.task.path)
        slot, layout = self._slot(), request.layout
        load = pipe.Load(
            run_id=request.run_id,
            task=request.task,
            seed=request.seed,
            layout=offer.layout,
            work=offer.work,
            slot=slot,
            private=request.example_level,
        )
        loaded = await self._supervisor.load(load)
        log.info(
            "task_loaded task=%s train=%d test=%d", request.task, loaded.train_examples, loaded.test_examples
        )
        try:
            protection = Protection.of(request, train_examples=loaded.train_examples)
            await self._spending.join(request.run_id, protection)
        except RefusedError:
            self._supervisor.release(request.run_id)
            raise
        model, update = self._supervisor.vectors(slot, layout.size)
        # What this agent prepared before it was started.
        prepared = None
        if request.secure is None:
            prepared = await asyncio.to_thread(self._outbox.read, request.run_id, terms=request.digest)
        return Participation(
            run_id=request.run_id,
            layout=layout,
            clip=request.clip_of_updates,
            protection=protection,
            work=request.work,
            secure=request.secure,
            kind=request.kind,
            terms=request.digest,
            holding=Holding(request.run_id, layout, model),
            update=update,
            personal=loaded.personal,
            prepared=prepared,
            sent=True,
            kept=isinstance(prepared, Prepared),
        )

    def _slot(self) -> int:
        """Room for a run's vectors.

        Raises:
            RefusedError: this site takes part in as many runs as its policy allows.
        """
        slot = self._supervisor.free_slot()
        if slot is None:  # nobody told this site that a run ended while it was not connected
            for other in self.runs.keys() - self._offered:
                self.leave(other)
            slot = self._supervisor.free_slot()
        if slot is None:
            raise RefusedError(
                Refusal(
                    RefusalCode.TASK_UNAVAILABLE,
                    f"this site takes part in {self._settings.policy.max_runs} runs already, as many as its "
                    "policy allows",
                )
            )
        return slot

    def leave(self, run_id: str) -> None:
        """The run is over."""
        self._sessions.drop(run_id)
        if self.runs.pop(run_id, None) is not None:
            self._supervisor.release(run_id)
        self._outbox.forget(run_id)
        self._variates.forget(run_id)

    def cancel(self) -> None:
        """The order under way is no longer wanted, whether it is being fetched, done or handed in."""
        self._transfers.call_off()
        self._supervisor.cancel()

    async def do(self, message: pb.Order, link: Link) -> None:
        """Do an order and hand in what comes of it. A re-sent order is answered with the same bytes."""
        run = self.runs.get(message.run_id)
        if run is None:
            return
        order, model = decode_order_id(message.id), message.model.digest
        self._transfers.begin()
        self._reach("job.ordered")
        try:
            if order.kind not in (run.kind, "evaluate"):
                raise RemoteProtocolError(f"expected {run.kind} orders, as was offered, found a {order}")
            if message.HasField("secure") != (run.secure is not None):
                raise RemoteProtocolError(
                    "expected an order whose update is summed as was offered, found another"
                )
            _check_control(run, order, message)
            prepared = run.answer(order, model)
            if prepared is None:
                prepared = await self._prepare(run, message, link)
                self._reach("job.prepared")
            elif prepared is not run.prepared and run.secure is None:
                self._remember(self._outbox.announce, prepared)
            run.prepared = prepared
            if message.HasField("control") and order.kind == "train":
                self._variates.handed_in(run.run_id, run.terms, order)
            await self._hand_in(run, prepared, link)
            self._reach("update.sent")
            await self._performer.settle(run)
        except RefusedError as error:
            if error.refusal.code != RefusalCode.CANCELLED:
                log.warning("order_failed run=%s order=%s reason=%s", run.run_id, order, error.refusal)
                self._fail(run, order, error.refusal)
        except LinkError as error:
            # The coordinator sends an open order again when the session is back.
            log.warning("order_interrupted run=%s order=%s reason=%s", run.run_id, order, error)
        except FedgeError as error:
            log.error(
                "order_failed run=%s order=%s reason=%s", run.run_id, order, error
            )  # no traceback needed
            self._fail(run, order, _refusal_of(error, RefusalCode.TASK_FAILED))
        finally:
            if self.runs.get(run.run_id) is not run:  # it ended meanwhile: what was kept since is of no use
                self._outbox.forget(run.run_id)
                self._variates.forget(run.run_id)
                await self._performer.settle(run)

    async def _prepare(self, run: Participation, message: pb.Order, link: Link) -> Prepared:
        """Fetch the model and do the work. What was lost is made good, or it is said.

        Raises:
            RefusedError: with the code UPDATE_LOST; this order was answered before, with other bytes.
        """
        order, lost = decode_order_id(message.id), None
        if isinstance(run.prepared, Lost) and run.prepared.answers(order, message.model.digest):
            lost = run.prepared
        # Work under privacy never gives the same bytes again: its noise is fresh.
        if lost is not None and (not lost.digest or run.protection.is_on):
            raise self._loss(run, lost)
        if lost is None:
            run.prepared, run.sent = None, False
        try:
            prepared = await self._pack(run, message, await self._released(run, message, link))
        except Exception:  # and not that this agent is to end: the next one gives back what it finds reserved
            await self._performer.give_back(run)
            raise
        if lost is not None and prepared.update.vector.digest != lost.digest:
            raise self._loss(run, lost)
        # Not before its update is paid for, on which later ones depend through it.
        made = run.variate
        if made is not None and (made[0].kind, made[0].round) == (order.kind, order.round):
            settled = decode_settled(message.control, order)
            await asyncio.to_thread(self._keep_variate, run, order, settled, made[1])
            run.variate = None
        # What was masked is of no use to another process, which cannot go on with its session.
        run.kept = run.secure is not None
        if run.secure is None:
            self._remember(self._outbox.announce, prepared)
        return prepared

    async def _released(self, run: Participation, message: pb.Order, link: Link) -> Released:
        """What the gate releases for an order, its price reserved. Of secure sums the same for each attempt at a round,
        until it was masked with noise of its own: nobody has seen it before, and no other needs to be paid for."""
        order, asked = decode_order_id(message.id), order_digest(message)
        await self._performer.settle(run)
        unmasked = run.unmasked.get(order.kind)
        if unmasked is not None and (unmasked.round, unmasked.asked) == (order.round, asked):
            if not unmasked.paid:
                await self._performer.reserve(run, order)
            return unmasked.released
        await self._transfers.insist(link, lambda: run.holding.reach(message, link))
        self._reach("job.fetched")
        self._transfers.check_wanted()
        run.unmasked.pop(order.kind, None)
        released = await self._performer.perform(run, message)
        if run.secure is not None:  # masked later, when the worker may have written over it
            released = replace(released, vector=released.vector.copy())
            run.unmasked[order.kind] = Unmasked(order.round, asked, released)
        return released

    def _loss(self, run: Participation, lost: Lost) -> RefusedError:
        run.prepared = None
        self._outbox.forget(run.run_id)
        return RefusedError(lost.refusal)

    def _fail(self, run: Participation, order: OrderId, refusal: Refusal) -> None:
        if run.protection.is_on:  # the message may be of the data: what the task has raised, say
            refusal = Refusal(refusal.code, "see the site's log")
        failed = pb.Failed(run_id=run.run_id, id=encode_order_id(order), refusal=encode_refusal(refusal))
        self._send(pb.ClientMessage(failed=failed))

    async def _pack(self, run: Participation, message: pb.Order, released: Released) -> Prepared:
        """The update as it leaves: of secure sums what says nothing by itself, else what the gate has released."""
        order, metrics, num_examples, proof = decode_order_id(message.id), released.metrics, 1, None
        if run.secure is None:
            await self._performer.pay(run)
            data, num_examples = bytes_of(released.vector), released.num_examples
            digest = await self._digest(data)
        else:
            masked = await self._sessions.mask(message, released, pay=partial(self._pay, run, order.kind))
            data, metrics = memoryview(masked.data), {}
            digest, proof = masked.proof.digest, masked.proof.signature
        small = len(data) <= INLINE_BYTES
        update = pb.Update(
            run_id=run.run_id,
            id=encode_order_id(order),
            num_examples=num_examples,
            metrics=encode_metrics(metrics),
            vector=pb.Blob(digest=digest, size=len(data), inline=bytes(data) if small else None),
            proof=proof,
        )
        return Prepared(order, message.model.digest, run.terms, update, data)

    async def _pay(self, run: Participation, kind: WorkKind) -> None:
        """What is kept of this kind is about to be masked. Noise of its own is for one attempt: another is another
        release."""
        await self._performer.pay(run)
        assert run.secure is not None  # nothing is masked but for secure sums
        unmasked = run.unmasked.pop(kind)
        if run.secure.noise is None:
            run.unmasked[kind] = replace(unmasked, paid=True)

    async def _digest(self, data: memoryview) -> bytes:
        return digest_of(data) if len(data) <= _ON_THREAD_BYTES else await asyncio.to_thread(digest_of, data)

    def _remember(self, keep: Callable[[Prepared], None], prepared: Prepared) -> None:
        """Keep an update for the case that this process ends: without it, the work would be done again."""
        try:
            keep(prepared)
        except StorageError as error:
            log.error(
                "update_not_kept run=%s order=%s reason=%s", prepared.update.run_id, prepared.order, error
            )

    def _keep_variate(self, run: Participation, order: OrderId, settled: Settled, variate: Array) -> None:
        try:
            self._variates.write(run.run_id, run.terms, order, settled, variate)
        except StorageError as error:
            log.error("own_state_not_kept run=%s order=%s reason=%s", run.run_id, order, error)

    async def _hand_in(self, run: Participation, prepared: Prepared, link: Link) -> None:
        update, data = prepared.update, prepared.data
        if update.vector.HasField("inline"):
            self._send(pb.ClientMessage(update=update))
            return
        keeping = None
        if not run.kept:  # it is written to disk while it is sent
            run.kept = True
            keeping = asyncio.create_task(asyncio.to_thread(self._remember, self._outbox.write, prepared))

        async def attempt() -> pb.Receipt:
            offset = await link.resume(update) if run.sent else 0
            run.sent = True
            return await link.deliver(update, data, offset=offset)

        try:
            log_receipt(await self._transfers.insist(link, attempt))
        finally:
            if keeping is not None:
                await keeping  # the vector lies in the worker's memory, which the next order will change


def _check_control(run: Participation, order: OrderId, message: pb.Order) -> None:
    """
    Raises:
        RemoteProtocolError: an order brings a control variate that it cannot, or does not say which of this site's
            updates count, by which its own layers are known.
    """
    if message.control.HasField("variate") and (order.kind != "train" or unsuited(run.work)):
        raise RemoteProtocolError(
            f"expected no control variate with a {order}: {unsuited(run.work) or 'it trains nothing'}"
        )
    said = message.HasField("control") and not message.control.HasField("variate")
    if said != bool(run.personal):
        expected, found = ("an order that says", "none") if run.personal else ("no order that says", "one")
        raise RemoteProtocolError(
            f"expected {expected} which update of this site's counts for its personal layers, found {found}"
        )


def _refusal_of(error: FedgeError, code: RefusalCode) -> Refusal:
    """What the coordinator is told of an error: its own refusal, or no more than its kind."""
    if isinstance(error, RefusedError):
        return error.refusal
    return Refusal(code, f"{type(error).__name__}: see the site's log")


def log_receipt(receipt: pb.Receipt) -> None:
    """Say in the site's log what became of an update."""
    order = decode_order_id(receipt.id)
    if receipt.HasField("refusal"):
        refusal = decode_refusal(receipt.refusal)
        log.warning("update_refused run=%s order=%s reason=%s", printable(receipt.run_id), order, refusal)
    else:
        log.debug("update_accepted run=%s order=%s", printable(receipt.run_id), order)
