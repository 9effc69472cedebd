"""Updates as sites hand them in, inline or in chunks: everything they say of themselves is checked, then their bytes.

What is refused is answered; what a broken link cuts off may go on where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from fedge.errors import BusyError, RefusedError, RemoteProtocolError
from fedge.events import OrderId
from fedge.exact import MAX_WEIGHT
from fedge.progress import delivered
from fedge.refusal import Refusal, RefusalCode
from fedge.wire import fedge_pb2 as pb
from fedge.wire.chunks import open_deliver_request
from fedge.wire.codec import (
    check_blob,
    decode_metrics,
    decode_order_id,
    encode_order_id,
    encode_refusal,
    printable,
    shorten,
)
from fedge.wire.limits import MAX_MESSAGE_BYTES
from fedge.wire.records import decode
from fedge_server.apps.exchange import Heard
from fedge_server.coordinator import Coordinator
from fedge_server.driver import RunDriver
from fedge_server.limits import Bucket, Concurrency
from fedge_server.uploads import Incoming, Uploads

log = logging.getLogger(__name__)

CHUNK_WAIT_S = 300.0
"""Between two chunks of an upload: one of them takes two minutes at 64 kbit/s."""


class Deliveries:
    """Takes updates for all runs of a coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        settings = coordinator.settings
        self._coordinator = coordinator
        self._under_way = Concurrency("uploads", each=settings.max_site_uploads, in_all=settings.max_uploads)
        self._rates: dict[str, Bucket] = {}

    @property
    def _uploads(self) -> Uploads:
        return self._coordinator.uploads

    async def inline(self, site: str, update: pb.Update) -> pb.Receipt:
        """A small update, which rides in one message."""
        order = decode_order_id(update.id)
        try:
            driver, expected = self._look_at(site, order, update)
            if not update.vector.HasField("inline"):
                raise _refused(RefusalCode.WRONG_LENGTH, "expected an update with its vector in it")
            upload = None
            if expected:
                upload = self._coordinator.spool.upload(
                    size=expected, digest=update.vector.digest, masked=driver.masked
                )
                try:
                    upload.write(update.vector.inline)
                    upload.finish()
                except BaseException:
                    upload.close()
                    raise
            outcome = await driver.deliver(site, order, update, upload)
        except RefusedError as error:
            self._count_refusal(site, update.run_id, order, error.refusal)
            outcome = error.refusal
        return _receipt(update, outcome)

    async def in_chunks(
        self, site: str, request: pb.DeliverRequest, requests: AsyncIterator[bytes]
    ) -> pb.Receipt:
        """A large update, or the rest of one. One that cannot count is answered before it is read.

        Raises:
            BusyError: this site, or all sites together, are delivering as many as they may at once.
                Or its bytes do not go on where those before have ended.
            RemoteProtocolError: its bytes end too early.
            TimeoutError: nothing came for long.
        """
        update = request.update
        order = decode_order_id(update.id)
        try:
            driver, expected = self._look_at(site, order, update)
            if not expected:
                raise _refused(RefusalCode.WRONG_LENGTH, "expected an update with a vector")
            with (
                self._under_way.one_of(site),
                self._uploads.receiving(
                    site,
                    update.run_id,
                    order,
                    size=expected,
                    digest=update.vector.digest,
                    offset=request.offset,
                    masked=driver.masked,
                ) as incoming,
            ):
                await self._fill(incoming, driver, requests)
            # From here on the upload is the run's, whatever becomes of this call.
            outcome = await driver.deliver(site, order, update, incoming.upload)
        except RefusedError as error:
            self._count_refusal(site, update.run_id, order, error.refusal)
            outcome = error.refusal
        return _receipt(update, outcome)

    async def app_reply(
        self, site: str, request: pb.DeliverRequest, requests: AsyncIterator[bytes]
    ) -> pb.Receipt:
        """A large reply to an app's message, or the rest of one; raises as `in_chunks`."""
        reply, apps = request.reply, self._coordinator.apps
        about, blob = decode(reply.message), reply.message.content
        self._coordinator.settings.limits.check_model(blob.size)
        check_blob(blob, expected_bytes=blob.size)
        run = apps.runs.get(reply.run_id)
        heard = run.exchange.would_hear(site, about.reply_to) if run is not None else Heard.TOO_EARLY
        if run is not None and heard is Heard.UNWANTED:
            run.tell_unwanted(site, about.reply_to)
        if heard is not Heard.TAKEN:
            return pb.Receipt(run_id=reply.run_id)
        if apps.kept_bytes + blob.size > self._coordinator.settings.max_kept_bytes:
            raise BusyError("replies that nobody has taken yet fill the room for them", retry_after_s=1.0)
        try:
            with (
                self._under_way.one_of(site),
                self._uploads.receiving(
                    site,
                    reply.run_id,
                    about.reply_to,
                    size=blob.size,
                    digest=blob.digest,
                    offset=request.offset,
                    masked=True,
                ) as incoming,
            ):
                await self._fill(incoming, None, requests)
        except RefusedError as error:
            raise RemoteProtocolError(str(error)) from None
        apps.stored(site, reply, incoming.upload)
        return pb.Receipt(run_id=reply.run_id)

    async def resume(self, site: str, request: pb.ResumeRequest) -> int:
        """How much of an update, or of an app's reply, has arrived."""
        subject = request.message or decode_order_id(request.id)
        return await self._uploads.resume(site, request.run_id, subject, request.digest)

    async def _fill(
        self, incoming: Incoming, driver: RunDriver | None, requests: AsyncIterator[bytes]
    ) -> None:
        """Keep what arrives until the sender ends, and check it; while one chunk is written the next is on its way."""
        site, _, subject = incoming.key
        faults = self._coordinator.archive.faults
        clock = asyncio.get_running_loop().time
        told = clock()
        while True:
            async with asyncio.timeout(CHUNK_WAIT_S):
                request = await anext(requests, None)
            if request is None:
                break
            data = open_deliver_request(request)
            if isinstance(data, pb.DeliverRequest):
                raise RemoteProtocolError("expected bytes of the update, found another update")
            if len(data) > MAX_MESSAGE_BYTES:
                raise _refused(RefusalCode.TOO_LARGE, f"expected chunks of at most {MAX_MESSAGE_BYTES} bytes")
            await incoming.write(data)
            faults.reach("upload.chunk")
            if driver is not None and clock() - told >= driver.progress_every_s:
                told = clock()
                assert isinstance(subject, OrderId)  # the driver's
                driver.progressed(site, subject, delivered(incoming.received, incoming.upload.size))
            await self._wait_for_its_turn(site, len(data))
        await incoming.settle()
        if incoming.upload.missing:
            # A link that broke looks like this, too: it is not held against the site, which may go on.
            raise RemoteProtocolError(f"expected {incoming.upload.missing} more bytes, found the end")
        incoming.upload.finish()

    async def _wait_for_its_turn(self, site: str, amount: int) -> None:
        """Read no faster than a site may send: its stream, and then it, waits."""
        rate = self._coordinator.settings.max_site_bytes_per_s
        if not rate:
            return
        bucket = self._rates.setdefault(site, Bucket(rate, burst=rate))
        wait_s = bucket.take(amount, now=asyncio.get_running_loop().time())
        if wait_s:
            await asyncio.sleep(wait_s)

    def _look_at(self, site: str, order: OrderId, update: pb.Update) -> tuple[RunDriver, int]:
        """Check everything that an update says of itself, before its bytes are read; the size that it must have."""
        driver = self._coordinator.runs.get(update.run_id)
        if driver is None and update.run_id in self._coordinator.past:
            raise _refused(RefusalCode.RUN_ENDED, "the run is over")
        if driver is None:
            raise _refused(RefusalCode.UNKNOWN_RUN, "no such run here")
        unwanted = driver.unwanted(site, order)
        if unwanted is not None:
            raise RefusedError(unwanted)
        if not 1 <= update.num_examples < MAX_WEIGHT:
            raise _refused(
                RefusalCode.BAD_WEIGHT,
                f"expected 1 to {MAX_WEIGHT - 1} examples, found {update.num_examples}",
            )
        try:
            decode_metrics(update.metrics)
        except RemoteProtocolError as error:
            raise _refused(RefusalCode.BAD_METRICS, str(error)) from None
        driver.check_masked(site, order, update)
        expected = driver.update_bytes(order)
        if update.vector.size != expected:
            raise _refused(
                RefusalCode.WRONG_LENGTH, f"expected a vector of {expected} bytes, found {update.vector.size}"
            )
        try:
            check_blob(update.vector, expected_bytes=expected)
        except RemoteProtocolError as error:
            raise _refused(RefusalCode.WRONG_DIGEST, str(error)) from None
        return driver, expected

    def _count_refusal(self, site: str, run_id: str, order: OrderId, refusal: Refusal) -> None:
        """A refused update costs the site its part in this round, unless it merely came late or twice."""
        named = printable(shorten(run_id, cap=100))  # the site's words: it may be no run's id at all
        log.warning("update_refused run=%s site=%s order=%s reason=%s", named, site, order, refusal)
        session = self._coordinator.sessions.get(site)
        if session is not None and refusal.code not in _HARMLESS:
            self._coordinator.fail(session, run_id, order, refusal)


_HARMLESS = frozenset(
    {
        RefusalCode.LATE,
        RefusalCode.DUPLICATE,
        RefusalCode.NOT_ASKED,
        RefusalCode.STALE,
        RefusalCode.RUN_ENDED,
        RefusalCode.UNKNOWN_RUN,
    }
)


def _receipt(update: pb.Update, outcome: Refusal | None) -> pb.Receipt:
    return pb.Receipt(
        run_id=update.run_id,
        id=encode_order_id(decode_order_id(update.id)),
        refusal=encode_refusal(outcome) if outcome is not None else None,
    )


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
