"""The agent: keeps the session up, and does what comes over it, one job at a time.

It is small (no torch), outlives its worker and its link, and ends only when it is told to or when the
coordinator will never let it in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from fedge.errors import (
    BusyError,
    ConfigError,
    FedgeError,
    IdentityError,
    LinkError,
    RefusedError,
    RemoteProtocolError,
)
from fedge.events import OrderId
from fedge.faults import Faults
from fedge.memory import give_back_freed
from fedge.secagg.site import Rules
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_order_id, encode_order_id, printable
from fedge.wire.status import retry_after_s
from fedge_client import admission
from fedge_client.apps.taking_part import Apps
from fedge_client.directory import KnownDirectory
from fedge_client.identity import Identity, accept_renewal, load_identity, make_csr, save_identity
from fedge_client.jobs import Jobs, log_receipt
from fedge_client.ledger import Ledger
from fedge_client.link import Link, SessionCall
from fedge_client.secure_sessions import SecureSessions
from fedge_client.settings import ClientSettings
from fedge_client.spending import Spending
from fedge_client.spent import SpentRounds
from fedge_client.supervisor import Supervisor
from fedge_client.witness import Seal

log = logging.getLogger(__name__)

_SPENT = "secure"
_BACKOFF_S = 0.25
_SOON_S = 60.0
_MAX_BACKOFF_SOON_S = 2.0
_MAX_BACKOFF_S = 30.0
_MAX_QUEUED_JOBS = 256
_MAX_QUEUED_FOR_APPS = 64
_POST_S = 60.0
_RENEW_AT = 2 / 3
_RENEW_RETRY_S = 3600.0

_Outgoing = asyncio.Queue[tuple[pb.ClientMessage, asyncio.Semaphore | None]]
"""Messages, and whose room each takes."""


class Agent:
    """One site's client process."""

    def __init__(self, settings: ClientSettings, client_toml: Path) -> None:
        self._settings = settings
        self._folder = client_toml.parent.resolve()
        self._identity = load_identity(self._folder / settings.identity, now=_now())
        self._supervisor = Supervisor(
            client_toml, self._identity.site, settings.worker, slots=settings.policy.max_runs
        )
        self._faults = Faults.of(os.environ)
        if self._faults.armed:
            log.warning("fault_armed point=%s", self._faults.armed)
        self._ledger = Ledger.open(
            self._folder / settings.ledger.path,
            settings.ledger.dataset,
            settings.policy.delta,
            self._faults,
            head_folder=self._folder / settings.identity,
        )
        self._seal = Seal(self._identity.key_pem, settings.ledger.dataset)
        spending = Spending(self._ledger, settings.policy, self._tell_witness)
        self._sessions = SecureSessions(
            self._identity,
            KnownDirectory.open(self._folder / settings.identity, self._identity),
            SpentRounds(self._folder / settings.identity / _SPENT),
            rules=Rules(settings.policy.min_cohort, settings.policy.honest_coordinator),
            send=self._send,
            failed=self._stop_working,
            faults=self._faults,
        )
        self._jobs = Jobs(
            settings, self._folder, self._supervisor, spending, self._sessions, self._send, self._faults
        )
        self._apps = Apps(settings, self._folder, self.site, self._post)
        self._queue: deque[pb.ServerMessage] = deque()
        self._work_to_do = asyncio.Event()
        self._doing: pb.ServerMessage | None = None
        self._doing_over: Link | None = None
        self._link: Link | None = None
        self._outgoing: _Outgoing | None = None
        self._room_for_apps = asyncio.Semaphore(_MAX_QUEUED_FOR_APPS)
        """What apps may have in that queue: the rest is for runs."""
        self._call: SessionCall | None = None
        self._was_connected = False
        self._back_in_s = 0.0
        """When the coordinator would like this site back, if it has said so."""

    @property
    def site(self) -> str:
        return self._identity.site

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            IdentityError, ConfigError: the coordinator is not the right one, or refuses this site for good.
        """
        background = [
            asyncio.create_task(self._work(), name="jobs"),
            asyncio.create_task(self._renew(), name="renewal"),
            asyncio.create_task(self._sessions.run(), name="secure sums"),
        ]
        session = asyncio.create_task(self._stay_connected(), name="session")
        try:
            done, _ = await asyncio.wait({session, *background}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (session, *background):
                task.cancel()
            await asyncio.gather(session, *background, return_exceptions=True)
            await self._apps.close()
            await self._supervisor.close()
            self._ledger.close()

    async def _stay_connected(self) -> None:
        """Open a session, again and again, with full jitter between attempts that fail."""
        failures, down_since = 0, time.monotonic()
        while True:
            connected = False
            try:
                self._back_in_s = 0.0
                self._link = Link.of(self._settings.server, self._identity, self._faults)
                try:
                    connected = await self._session(self._link)
                finally:
                    await self._link.close()
                log.warning("session_ended because=the coordinator closed it")
            except (IdentityError, ConfigError, RefusedError, RemoteProtocolError) as error:
                # Before the first session this is a mistake in the set-up; later it may pass.
                if (
                    not self._was_connected
                    or isinstance(error, (ConfigError, RefusedError))
                    or _for_good(error)
                ):
                    raise
                log.warning("session_failed reason=%s", error)
            except FedgeError as error:
                log.warning("session_failed reason=%s", error)
                if isinstance(error, BusyError):
                    self._back_in_s = error.retry_after_s
            except Exception:  # a defect in one session must not end a site's part in its runs
                log.exception("session_crashed")
            if connected:
                failures, down_since = 0, time.monotonic()
            longest = backoff_s(failures, down_s=time.monotonic() - down_since)
            failures += 1
            wait_s = self._back_in_s * random.uniform(1, 1.1) or random.uniform(0, longest)  # noqa: S311  # jitter
            await asyncio.sleep(wait_s)

    async def _session(self, link: Link) -> bool:
        """One session from greeting to end; True if it was greeted."""
        call, welcome = await link.open_session()
        admission.check_coordinator(self._settings.policy, welcome.federation, own=self._identity.federation)
        await self._hear_witness(welcome.witness)
        log.info("session_started server=%s federation=%s", self._settings.server, welcome.federation)
        self._was_connected = True
        self._jobs.new_session()
        self._queue = deque(message for message in self._queue if not message.HasField("offer"))
        self._outgoing = asyncio.Queue(_MAX_QUEUED_JOBS + _MAX_QUEUED_FOR_APPS)
        self._room_for_apps, self._call = asyncio.Semaphore(_MAX_QUEUED_FOR_APPS), call
        self._apps.new_session()
        self._tell_witness()
        writer = asyncio.create_task(self._write(link, call, self._outgoing), name="session writer")
        try:
            async for message in link.read(call):
                self._take(message)
        finally:
            self._outgoing = None
            writer.cancel()
            call.cancel()
            with suppress(asyncio.CancelledError, FedgeError):
                await writer
        return True

    async def _hear_witness(self, sealed: bytes) -> None:
        """Compare the ledger with what it was when this site was last connected.

        Raises:
            RefusedError: LEDGER_UNUSABLE; it was further then, and its owner has not accepted that.
        """
        head = self._seal.open(sealed) if sealed else None
        if head is not None:
            await asyncio.to_thread(self._ledger.check_witness, *head)
        elif sealed:
            log.warning(
                "witness_unreadable because=it is of another key or data set; a new one takes its place"
            )

    def _tell_witness(self) -> None:
        if self._ledger.head[0] == 0:  # nothing has been spent: nobody could put back less
            return
        witness = pb.Witness(sealed=self._seal.close(self._ledger.head))
        self._send(pb.ClientMessage(witness=witness))

    async def _write(self, link: Link, call: SessionCall, outgoing: _Outgoing) -> None:
        with suppress(LinkError):  # the call is over; its reader says so
            while True:
                message, room = await outgoing.get()
                await link.write(call, message)
                if room is not None:
                    room.release()

    def _send(self, message: pb.ClientMessage) -> None:
        """Queue a message for the session; without one it is dropped, since a new session starts afresh."""
        spare = message.WhichOneof("kind") in ("progress", "witness")  # the next one says more
        if self._outgoing is None or (spare and self._outgoing.full()):
            return
        self._outgoing.put_nowait((message, None))

    async def _post(self, message: pb.ClientMessage) -> None:
        """As `_send`, but it waits for room."""
        outgoing, room = self._outgoing, self._room_for_apps
        if outgoing is None:
            return
        try:
            async with asyncio.timeout(_POST_S):
                await room.acquire()
        except TimeoutError:
            log.warning("session_stuck because=nothing could be sent for %g s", _POST_S)
            if outgoing is self._outgoing and self._call is not None:
                self._call.cancel()  # in the next session everything is said again
            return
        if outgoing is self._outgoing:
            outgoing.put_nowait((message, room))

    def _take(self, message: pb.ServerMessage) -> None:
        match message.WhichOneof("kind"):
            case "offer" if self._jobs.accept_again(message.offer.run_id):
                pass  # at once, whatever is under way: the coordinator counts on those who are back
            case "roster" | "envelopes" | "survivors" | "consents":
                self._sessions.hear(message)
            case "offer" | "order":
                self._supersede(message.order)
                self._show_keys(message.order)
                # What is sent again after a reconnection is done again only where it was not handed in over this link.
                known = _asked(message)
                if known in map(_asked, self._queue):
                    return
                if (
                    self._doing is not None
                    and known == _asked(self._doing)
                    and self._doing_over is self._link
                ):
                    return
                if len(self._queue) == _MAX_QUEUED_JOBS:
                    raise RemoteProtocolError(f"expected at most {_MAX_QUEUED_JOBS} open orders and offers")
                self._queue.append(message)
                self._work_to_do.set()
            case "app_offer" | "app_order" | "app_forget":
                if self._link is not None:
                    self._apps.hear(message, self._link)
            case "cancel":
                self._cancel(message.cancel)
            case "receipt":
                log_receipt(message.receipt)
            case "closing":
                self._closing(message.closing)
            case "ended":
                ended = message.ended
                told = f"run={ended.run_id} status={ended.status} reason={ended.reason}"
                log.info("run_ended %s", printable(told))
                self._forget(ended.run_id)
                self._apps.ended(ended.run_id)
            case other:
                raise RemoteProtocolError(f"expected a message of a known kind, found {other}")

    def _closing(self, closing: pb.Closing) -> None:
        reason = printable(closing.reason)
        if closing.replaced:
            # Two that take turns would evict each other for ever; the newer one stays.
            raise IdentityError(
                f"another client connected as site {self.site!r}: each site runs one client; stop one of them"
            )
        self._back_in_s = retry_after_s(closing.retry_after_s)
        log.warning("session_ending because=%s back_in_s=%.1f", reason, self._back_in_s)

    def _supersede(self, order: pb.Order) -> None:
        """An order of the same name on another model: the coordinator has lost the round that the first was of."""
        doing = self._doing.order if self._doing is not None else None
        if doing is None or (doing.run_id, doing.id) != (order.run_id, order.id):
            return
        if _asked(pb.ServerMessage(order=doing)) != _asked(pb.ServerMessage(order=order)):
            self._jobs.cancel()

    def _show_keys(self, order: pb.Order) -> None:
        """Begin with an order's secure sum at once, whatever is under way: everybody waits for these keys."""
        run = self._jobs.runs.get(order.run_id)
        if run is not None and run.secure is not None and order.HasField("secure") and self._link is not None:
            self._sessions.order(run, order, self._link)

    def _stop_working(self, run_id: str, order: OrderId) -> None:
        """An order's secure sum has failed: nobody wants what is done for it any more."""
        self._cancel(pb.Cancel(run_id=run_id, id=encode_order_id(order)))

    def _cancel(self, cancel: pb.Cancel) -> None:
        doing = self._doing.order if self._doing is not None else None
        if doing is not None and (doing.run_id, doing.id) == (cancel.run_id, cancel.id):
            self._jobs.cancel()
        self._sessions.drop(cancel.run_id, decode_order_id(cancel.id))
        self._drop(cancel.run_id, cancel.id)

    def _forget(self, run_id: str) -> None:
        if self._doing is not None and self._doing.order.run_id == run_id:
            self._jobs.cancel()
        self._drop(run_id, None)
        self._jobs.leave(run_id)
        give_back_freed()

    def _drop(self, run_id: str, order: pb.OrderId | None) -> None:
        """Take a run's queued order, or all that is queued for the run, off the queue."""
        self._queue = deque(
            message
            for message in self._queue
            if not (
                (message.order.run_id == run_id and order in (None, message.order.id))
                or (message.offer.run_id == run_id and order is None)
            )
        )

    async def _work(self) -> None:
        """Do what is queued, in order, for ever. One job's failure is that job's."""
        while True:
            while not self._queue:
                self._work_to_do.clear()
                await self._work_to_do.wait()
            self._doing, self._doing_over = self._queue.popleft(), self._link
            try:
                if self._doing.WhichOneof("kind") == "offer":
                    await self._jobs.consider(self._doing.offer)
                elif self._link is not None:
                    await self._jobs.do(self._doing.order, self._link)
            except FedgeError as error:
                log.error("message_refused reason=%s", error)  # a peer's fault needs no traceback
            except Exception:
                log.exception("job_crashed")
            finally:
                self._doing = None

    async def _renew(self) -> None:
        """Renew the certificate when two thirds of its life are over."""
        while True:
            principal = self._identity.principal
            life = (principal.not_after - principal.not_before).total_seconds()
            left = (principal.not_after - _now()).total_seconds()
            await asyncio.sleep(max(1.0, left - life * (1 - _RENEW_AT)))
            try:
                self._identity = await self._renewed()
                log.info("certificate_renewed until=%s", self._identity.principal.not_after.isoformat())
            except FedgeError as error:
                log.warning("certificate_not_renewed reason=%s", error)
                await asyncio.sleep(min(_RENEW_RETRY_S, max(1.0, left / 10)))

    async def _renewed(self) -> Identity:
        old = self._identity
        _, csr = make_csr(old.key_pem)
        link = Link.of(self._settings.server, old)
        try:
            certificate = await link.renew(csr)
        finally:
            await link.close()
        identity = accept_renewal(old, certificate, now=_now())
        save_identity(self._folder / self._settings.identity, identity)
        return identity


def _asked(message: pb.ServerMessage) -> pb.ServerMessage:
    """What it asks, without how far the coordinator has kept its rounds: that alone makes no other order of it."""
    if not message.order.HasField("control"):
        return message
    asked = pb.ServerMessage()
    asked.CopyFrom(message)
    asked.order.control.ClearField("kept")
    return asked


def backoff_s(failures: int, *, down_s: float) -> float:
    """The longest wait after so many failures in a row, of which there may be any number.

    A coordinator that restarts is back within seconds, and its runs wait for their clients: in the first
    minute the longest wait stays short.
    """
    cap = _MAX_BACKOFF_SOON_S if down_s < _SOON_S else _MAX_BACKOFF_S
    return min(cap, _BACKOFF_S * 2.0 ** min(failures, 10))


def _for_good(error: FedgeError) -> bool:
    """Whether the coordinator itself said no (revoked, superseded), rather than a handshake."""
    return isinstance(error, IdentityError) and "no trusted connection" not in str(error)


def _now() -> datetime:
    return datetime.now(UTC)
