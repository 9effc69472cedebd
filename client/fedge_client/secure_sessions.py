"""This site's part in the secure sums of its runs: the messages of each session, beside the jobs.

Keys and shares are exchanged while the worker trains, consent and reveal while it may be at the next order already.
So messages are handled here, in the order in which they came, by a task of their own. A session ends with this
process: its secrets are in memory alone. What must outlive it (`SpentRounds`) is on disk before it is acted on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from fedge.errors import BlamedError, FedgeError, LinkError, RefusedError, RemoteProtocolError
from fedge.events import OrderId
from fedge.faults import Faults
from fedge.privacy.secure import KEY_BYTES, SecureSource
from fedge.refusal import Refusal, RefusalCode
from fedge.secagg.shards import shard_of
from fedge.secagg.site import Rules
from fedge.wire import fedge_pb2 as pb
from fedge.wire import secure as codec
from fedge.wire.agreed import order_digest
from fedge.wire.codec import decode_order_id, encode_order_id, encode_refusal
from fedge.wire.limits import MAX_DEADLINE_S
from fedge_client.directory import KnownDirectory, Source
from fedge_client.gate import Released
from fedge_client.identity import Identity
from fedge_client.participation import Participation
from fedge_client.secure_part import MaskedUpdate, SecurePart
from fedge_client.spent import SpentRounds
from fedge_client.transfer import Closable, pause_s

log = logging.getLogger(__name__)

MAX_WAITING = 1024
"""Messages that wait to be handled, at most."""

Send = Callable[[pb.ClientMessage], None]


class Link(Source, Closable, Protocol):
    """Where the directory comes from, as long as it is there."""


@dataclass(eq=False)
class _Session:
    """One order's, which asks for this. `part` is there once keys were made; `ready` is done when an update can be
    masked, or fails when none will be."""

    order: OrderId
    asked: bytes
    ready: asyncio.Future[SecurePart] = field(repr=False)
    part: SecurePart | None = None
    failures: int = 0
    """How often the directory could not be had."""
    spent: bool = False
    """Whether it is on disk that this site reveals its shares."""

    def give_up(self, refusal: Refusal) -> None:
        if not self.ready.done():
            self.ready.set_exception(RefusedError(refusal))
            self.ready.exception()  # nobody may be waiting for it


class SecureSessions:
    """All sessions of this site, one for each run and kind of order. Belongs to the event loop's thread.

    `failed` is called when a session cannot go on: what is done for its order is of no use any more.
    """

    def __init__(
        self,
        identity: Identity,
        directory: KnownDirectory,
        spent: SpentRounds,
        *,
        rules: Rules,
        send: Send,
        failed: Callable[[str, OrderId], None],
        faults: Faults | None = None,
    ) -> None:
        self._identity = identity
        self._directory = directory
        self._spent = spent
        self._rules = rules
        self._send = send
        self._failed = failed
        self._reach = (faults or Faults()).reach
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._waiting: deque[tuple[str, OrderId, Callable[[], Awaitable[None]]]] = deque()
        self._news = asyncio.Event()

    def order(self, run: Participation, message: pb.Order, link: Link) -> None:
        """An order came: show keys for it."""
        order, asked = decode_order_id(message.id), order_digest(message)
        session = self._session(run.run_id, order)
        if session is None or session.asked != asked:
            older = self._sessions.get((run.run_id, order.kind))
            if older is not None:
                older.give_up(
                    Refusal(RefusalCode.CANCELLED, "the coordinator has begun with another attempt")
                )
            ready: asyncio.Future[SecurePart] = asyncio.get_running_loop().create_future()
            session = self._sessions[run.run_id, order.kind] = _Session(order, asked, ready)
        self._enqueue(run.run_id, order, partial(self._begin, run, session, message, link))

    def hear(self, message: pb.ServerMessage) -> None:
        """A session's message came."""
        kind = message.WhichOneof("kind")
        match kind:
            case "roster":
                of: pb.Roster | pb.Envelopes | pb.Survivors | pb.Consents = message.roster
                handle: Callable[[_Session, SecurePart], Awaitable[None]] = partial(
                    self._share, message.roster
                )
            case "envelopes":
                of, handle = message.envelopes, partial(self._open, message.envelopes)
            case "survivors":
                of, handle = message.survivors, partial(self._consent, message.survivors)
            case "consents":
                of, handle = message.consents, partial(self._reveal, message.consents)
            case _:
                raise RemoteProtocolError(f"expected a message of secure aggregation, found {kind}")
        run_id, order = of.run_id, decode_order_id(of.id)

        async def with_session() -> None:
            session = self._session(run_id, order)
            if session is not None and session.part is not None:  # else it is over here, or was never begun
                await handle(session, session.part)

        self._enqueue(run_id, order, with_session)

    async def mask(
        self, message: pb.Order, released: Released, *, pay: Callable[[], Awaitable[None]]
    ) -> MaskedUpdate:
        """What leaves of the update that answers this order, once its session has come so far. `pay` is called when it
        has: what is masked may leave.

        Raises:
            RefusedError: CANCELLED; the session is over, or the others' shares do not come in the order's time.
                Or NOT_FINITE: it cannot be encoded.
        """
        order = decode_order_id(message.id)
        session = self._session(message.run_id, order)
        if session is None or session.asked != order_digest(message):
            raise _over(order)
        if not session.ready.done():
            log.info(
                "update_waits run=%s order=%s for=the shares of the others' seeds", message.run_id, order
            )
        try:
            part = await asyncio.wait_for(asyncio.shield(session.ready), _patience_s(message))
        except TimeoutError:
            raise _over(order) from None
        await pay()
        source = SecureSource(secrets.token_bytes(KEY_BYTES))  # of rounding and of noise: nobody may guess it
        masked = await asyncio.to_thread(part.mask, released, source)
        if masked.cut:
            log.warning(
                "update_cut run=%s order=%s reason=elements beyond the run's bound were cut to it, so that the sum has "
                "less of what was learned here; the run's owner may raise secure_aggregation.bound",
                *(message.run_id, order),
            )
        self._reach("sum.masked")
        return masked

    def drop(self, run_id: str, order: OrderId | None = None) -> None:
        """An order is called off, or all of a run's are."""
        for key, session in list(self._sessions.items()):
            if key[0] == run_id and order in (None, session.order):
                session.give_up(Refusal(RefusalCode.CANCELLED, "called off by the coordinator"))
                del self._sessions[key]

    async def run(self) -> None:
        """Handle messages as they come, for ever. What goes wrong costs this site its part in that sum alone."""
        while True:
            while not self._waiting:
                self._news.clear()
                await self._news.wait()
            run_id, order, handle = self._waiting.popleft()
            try:
                await handle()
            except LinkError as error:  # the order comes again over the next link
                log.warning("session_interrupted run=%s order=%s reason=%s", run_id, order, error)
            except FedgeError as error:
                self._fail(run_id, order, error)
            except Exception as error:
                log.exception("secure_session_crashed run=%s order=%s", run_id, order)
                self._fail(run_id, order, FedgeError(f"internal error: {type(error).__name__}"))

    def _enqueue(self, run_id: str, order: OrderId, handle: Callable[[], Awaitable[None]]) -> None:
        if len(self._waiting) == MAX_WAITING:
            raise RemoteProtocolError(
                f"expected at most {MAX_WAITING} messages of secure aggregation at once"
            )
        self._waiting.append((run_id, order, handle))
        self._news.set()

    def _session(self, run_id: str, order: OrderId) -> _Session | None:
        session = self._sessions.get((run_id, order.kind))
        return session if session is not None and session.order == order else None

    async def _begin(self, run: Participation, session: _Session, message: pb.Order, link: Link) -> None:
        if self._session(run.run_id, session.order) is not session:
            return  # called off meanwhile
        if session.part is None:
            try:
                session.part = await self._part(run, session.order, message, link)
            except LinkError as error:
                if link.closed:
                    raise
                self._begin_later(run, session, message, link, wait_s=pause_s(error, session.failures))
                session.failures += 1
                return
        member = codec.encode_member(session.part.advertisement)
        advertise = pb.Advertise(run_id=run.run_id, id=message.id, member=member)
        self._send(pb.ClientMessage(advertise=advertise))
        self._reach("sum.advertised")

    def _begin_later(
        self, run: Participation, session: _Session, message: pb.Order, link: Link, *, wait_s: float
    ) -> None:
        """The directory could not be had, but the link is there."""
        log.info("directory_not_fetched run=%s again_in_s=%.1f", run.run_id, wait_s)
        begin = partial(self._begin, run, session, message, link)
        asyncio.get_running_loop().call_later(wait_s, self._enqueue, run.run_id, session.order, begin)

    async def _part(self, run: Participation, order: OrderId, message: pb.Order, link: Link) -> SecurePart:
        """P0: this site's part, with keys of its own; that it begins is on disk before anybody sees them."""
        assert run.secure is not None  # only such orders come here
        directory = await self._directory.at(message.secure.epoch, link)
        context = run.secure.context(
            federation=self._identity.federation,
            run_id=run.run_id,
            order=order,
            offer=run.terms,
            model=order_digest(message),
            epoch=message.secure.epoch,
        )
        seed = context.digest
        if context.shards > 1:
            context = replace(context, shard=shard_of(context, self._identity.site))
        size = 0 if order.kind == "evaluate" else run.layout.size
        part = SecurePart(
            context,
            self._identity.site,
            self._identity.signing,
            rules=self._rules,
            directory=directory,
            encoding=run.secure.encoding(size, seed),
            entropy=secrets.token_bytes,
        )
        await asyncio.to_thread(self._spent.begin, run.run_id, order)
        self._reach("sum.begun")
        return part

    async def _share(self, message: pb.Roster, session: _Session, part: SecurePart) -> None:
        roster = codec.decode_roster(message.members)
        shares = await asyncio.to_thread(part.share, roster)
        envelopes = codec.encode_shares(shares)
        share = pb.Share(run_id=message.run_id, id=message.id, envelopes=envelopes)
        self._send(pb.ClientMessage(share=share))
        self._reach("sum.shared")

    async def _open(self, message: pb.Envelopes, session: _Session, part: SecurePart) -> None:
        envelopes = codec.decode_envelopes(message.envelopes)
        await asyncio.to_thread(part.open, envelopes)
        self._reach("sum.opened")
        if not session.ready.done():
            session.ready.set_result(part)

    async def _consent(self, message: pb.Survivors, session: _Session, part: SecurePart) -> None:
        signature = part.consent(message.members)
        consent = pb.Consent(run_id=message.run_id, id=message.id, signature=signature)
        self._send(pb.ClientMessage(consent=consent))
        self._reach("sum.consented")

    async def _reveal(self, message: pb.Consents, session: _Session, part: SecurePart) -> None:
        order = session.order
        reveal = part.reveal(codec.decode_consents(message))
        if not session.spent:  # on disk before a byte of it leaves
            await asyncio.to_thread(self._spent.spend, message.run_id, order)
            session.spent = True
            self._reach("sum.spent")
            log.info("shares_revealed run=%s order=%s", message.run_id, order)
        shares = codec.encode_reveal(reveal)
        reveal_message = pb.Reveal(run_id=message.run_id, id=message.id, shares=shares)
        self._send(pb.ClientMessage(reveal=reveal_message))
        self._reach("sum.revealed")

    def _fail(self, run_id: str, order: OrderId, error: FedgeError) -> None:
        log.warning("secure_sum_refused run=%s order=%s reason=%s", run_id, order, error)
        culprits = error.culprits if isinstance(error, BlamedError) else ()
        refusal = (
            error.refusal
            if isinstance(error, RefusedError)
            else Refusal(RefusalCode.TASK_FAILED, f"{type(error).__name__}: see the site's log")
        )
        session = self._session(run_id, order)
        if session is not None:
            session.give_up(Refusal(RefusalCode.CANCELLED, "this site has refused its secure sum"))
            del self._sessions[run_id, order.kind]
        failed = pb.Failed(
            run_id=run_id, id=encode_order_id(order), refusal=encode_refusal(refusal), culprits=culprits
        )
        self._send(pb.ClientMessage(failed=failed))
        self._failed(run_id, order)


def _patience_s(message: pb.Order) -> float:
    """How long the others' shares are waited for: they come while everybody trains."""
    return message.deadline_s if 0 < message.deadline_s <= MAX_DEADLINE_S else MAX_DEADLINE_S


def _over(order: OrderId) -> RefusedError:
    return RefusedError(Refusal(RefusalCode.CANCELLED, f"the secure sum of the {order} is over"))
