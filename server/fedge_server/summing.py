"""The secure sums of a run's open orders: what sites say in them, and what they are told.

The driver calls this behind the machine's events and effects, so that the machine decides who takes part and what
counts. No update is ever in this process's memory without its mask: what arrives is added up as it came, and the
masks come off the sum.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from fedge.errors import RefusedError, RemoteProtocolError
from fedge.events import (
    Advertised,
    Broken,
    Consented,
    Disclose,
    Enlist,
    Event,
    Failed,
    Mask,
    OrderId,
    Remind,
    Revealed,
    SecureEffect,
    Shared,
    Survive,
    Unmask,
)
from fedge.pipeline import Aggregate
from fedge.refusal import Refusal, RefusalCode
from fedge.secagg.session import InputProof
from fedge.secagg.terms import SumTerms
from fedge.signing import SignedDirectory
from fedge.vector import Layout
from fedge.wire import fedge_pb2 as pb
from fedge.wire import secure as codec
from fedge.wire.agreed import offer_digest, order_digest
from fedge.wire.codec import decode_order_id, encode_order_id
from fedge_server.secure_sum import Due, SecureSum
from fedge_server.spool import Upload

log = logging.getLogger(__name__)

Outbox = Callable[[str, pb.ServerMessage], None]
Keys = Callable[[], Awaitable[SignedDirectory]]
"""Where the newest directory of the sites' keys comes from."""

Heard = Advertised | Shared | Consented | Revealed
"""What a site's message in a session is to the machine."""

_CODES = {
    Advertised: RefusalCode.ROSTER_INVALID,
    Shared: RefusalCode.SHARES_INVALID,
    Consented: RefusalCode.CONSENTS_INVALID,
    Revealed: RefusalCode.SHARES_INVALID,
}


class Summing:
    """One run's. All methods but `add` belong to the event loop's thread."""

    def __init__(
        self,
        terms: SumTerms,
        offer: pb.Offer,
        layout: Layout,
        keys: Keys,
        outbox: Outbox,
        post: Callable[[Event], None],
        *,
        divisor: int | None = None,
    ) -> None:
        """`post` tells the run's machine what has happened; sums are divided by `divisor`, or by their weight."""
        self._terms = terms
        self._run_id = offer.run_id
        self._offer = offer_digest(offer)
        self._size = layout.size
        self._keys = keys
        self._outbox = outbox
        self._post = post
        self._divisor = divisor
        self._unmasking: set[asyncio.Task[None]] = set()
        self._sums: dict[OrderId, SecureSum] = {}
        self._aggregates: dict[OrderId, Aggregate] = {}
        self._heard: dict[Heard, pb.ClientMessage] = {}

    def update_bytes(self, order: OrderId) -> int:
        """What a masked update for an order measures."""
        return self._terms.encoding(self._size_of(order), b"").packed_bytes

    async def begin(self, order: OrderId, message: pb.Order) -> None:
        """An order goes out: add to its message where the members' keys are found.

        Raises:
            RunError: there is no directory of keys yet; it says what the operator has to do.
            StorageError: the directory cannot be read.
        """
        if order not in self._sums:
            directory = (await self._keys()).directory
            context = self._terms.context(
                federation=directory.federation,
                run_id=self._run_id,
                order=order,
                offer=self._offer,
                model=order_digest(message),
                epoch=directory.epoch,
            )
            encoding = self._terms.encoding(self._size_of(order), context.digest)
            self._sums[order] = SecureSum(context, directory, encoding, self._divisor)
        message.secure.epoch = self._sums[order].context.epoch

    def hear(self, event: Heard, message: pb.ClientMessage) -> None:
        """A message that the machine waits for is here: one of each site and kind is kept until it is handled."""
        if event not in self._heard:
            self._heard[event] = message
            self._post(event)

    def take(self, event: Heard, *, wanted: bool) -> Heard | Failed:
        """Take note of what a site has said, if somebody waits for it. If it cannot be what was asked for, the site
        has failed."""
        message, known = self._heard.pop(event), self._sums.get(event.order)
        try:
            if wanted and known is not None:
                _apply(known, event, message)
        except RemoteProtocolError as error:
            return Failed(event.client, event.order, Refusal(_CODES[type(event)], str(error)))
        return event

    def event(self, site: str, message: pb.ClientMessage) -> Heard | None:
        """What a site's message is to the machine; None if it is about no order that is open here."""
        match message.WhichOneof("kind"):
            case "advertise":
                order = decode_order_id(message.advertise.id)
                known = self._sums.get(order)
                return Advertised(site, order, known.shard(site)) if known is not None else None
            case "share":
                event: Heard = Shared(site, decode_order_id(message.share.id))
            case "consent":
                event = Consented(site, decode_order_id(message.consent.id))
            case _:
                event = Revealed(site, decode_order_id(message.reveal.id))
        return event if event.order in self._sums else None

    def do(self, effect: SecureEffect) -> None:
        """Take a step of the protocol, and tell its members. The last one, `Unmask`, is an event when it is done."""
        order, known = effect.order, self._sums[effect.order]
        match effect:
            case Enlist(_, clients):
                known.enlist(clients)
                self._tell(order, clients, "roster")
            case Mask(_, clients):
                known.mask(clients)
                self._tell(order, clients, "envelopes")
            case Survive(_, clients):
                known.survive(clients)
                self._tell(order, clients, "survivors")
            case Disclose(_, clients):
                for client in clients:
                    known.disclose(client)
                self._tell(order, clients, "consents")
            case Remind(client, _):
                self._tell(order, [client], *known.due(client))
            case Unmask(_, clients):
                unmasking = asyncio.create_task(self._unmask(order, clients), name=f"unmask {self._run_id}")
                self._unmasking.add(unmasking)
                unmasking.add_done_callback(self._unmasking.discard)

    def check(self, site: str, order: OrderId, update: pb.Update) -> None:
        """Whether an update may be added: masked, signed, and with nothing in clear beside it.

        Raises:
            RefusedError: it may not.
        """
        if update.num_examples != 1 or update.metrics:
            raise _refused(
                RefusalCode.BAD_METRICS,
                "expected a masked update without metrics or a number of examples in clear, found some",
            )
        try:
            known = self._sums.get(order)
            if known is None:
                raise RemoteProtocolError("expected a masked update for an open order, found none such")
            known.check(site, InputProof(update.vector.digest, update.proof))
        except RemoteProtocolError as error:
            raise _refused(RefusalCode.ROSTER_INVALID, str(error)) from None

    def add(self, site: str, order: OrderId, proof: bytes, upload: Upload) -> None:
        """Add a masked update to its sum. On any thread, one at a time.

        Raises:
            RemoteProtocolError: as `check`.
            StorageError: it cannot be read back.
        """
        data = upload.read(0, upload.size)
        self._sums[order].add(site, InputProof(upload.digest, proof), data)

    async def _unmask(self, order: OrderId, clients: Collection[str]) -> None:
        """Take the masks off these clients' sum on a thread, and say how it went."""
        try:
            event, aggregate = await asyncio.to_thread(self._sums[order].outcome, clients)
        except Exception as error:  # a defect: this round cannot be had, and the run goes on
            log.exception("unmasking_crashed run=%s order=%s", self._run_id, order)
            event, aggregate = Broken(order, f"internal error: {type(error).__name__}", final=True), None
        if aggregate is not None:
            self._aggregates[order] = aggregate
        self._post(event)

    def close(self, order: OrderId) -> Aggregate:
        """The aggregate of an order whose masks are off; the order is over."""
        del self._sums[order]
        return self._aggregates.pop(order)

    def drop(self, order: OrderId) -> None:
        """An order is given up."""
        self._sums.pop(order, None)
        self._aggregates.pop(order, None)

    def stop(self) -> None:
        """The run is over in this process."""
        for unmasking in self._unmasking:
            unmasking.cancel()
        self._sums.clear()
        self._heard.clear()

    def _tell(self, order: OrderId, sites: Collection[str], *what: Due) -> None:
        # But for envelopes, all members of a shard are told the same.
        known: dict[tuple[Due, int], pb.ServerMessage] = {}
        for site in sites:
            shard = self._sums[order].shard(site)
            for each in what:
                message = known.get((each, shard)) or self._message(order, site, each)
                if each != "envelopes":
                    known[each, shard] = message
                self._outbox(site, message)

    def _message(self, order: OrderId, site: str, what: Due) -> pb.ServerMessage:
        known, run_id, id = self._sums[order], self._run_id, encode_order_id(order)
        match what:
            case "roster":
                members = codec.encode_members(known.roster(site))
                return pb.ServerMessage(roster=pb.Roster(run_id=run_id, id=id, members=members))
            case "envelopes":
                envelopes = codec.encode_envelopes(known.envelopes(site))
                return pb.ServerMessage(envelopes=pb.Envelopes(run_id=run_id, id=id, envelopes=envelopes))
            case "survivors":
                survivors = pb.Survivors(run_id=run_id, id=id, members=known.survivors(site))
                return pb.ServerMessage(survivors=survivors)
            case "consents":
                return pb.ServerMessage(consents=codec.encode_consents(run_id, id, known.disclose(site)))

    def _size_of(self, order: OrderId) -> int:
        return 0 if order.kind == "evaluate" else self._size


def _apply(known: SecureSum, event: Heard, message: pb.ClientMessage) -> None:
    match event:
        case Advertised(site, _):
            known.advertised(codec.decode_member(message.advertise.member, site=site))
        case Shared(site, _):
            known.shared(site, codec.decode_shares(message.share.envelopes))
        case Consented(site, _):
            known.consented(site, message.consent.signature)
        case Revealed(site, _):
            known.revealed(site, codec.decode_reveal(message.reveal.shares))


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
