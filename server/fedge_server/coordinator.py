"""What the coordinator holds: connected sites and runs, and who of the first takes part in which."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass

from fedge.errors import BusyError, ConfigError, FedgeError, RunError
from fedge.events import Failed, OrderId
from fedge.privacy.central import Central
from fedge.refusal import Refusal
from fedge.run import RunConfig
from fedge.run_state import Stop
from fedge.strategy import load_strategy
from fedge.vector import Model
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_layout
from fedge_server.apps.switchboard import Switchboard
from fedge_server.archive import Archive
from fedge_server.driver import RunDriver, Surroundings
from fedge_server.limits import Pace
from fedge_server.moments import start_of
from fedge_server.past import PastRun
from fedge_server.sessions import Session
from fedge_server.settings import ServerSettings
from fedge_server.spool import Spool
from fedge_server.store.records import KeptRun, RunRecord
from fedge_server.summing import Keys
from fedge_server.uploads import Uploads

log = logging.getLogger(__name__)

IDLE_S = 60.0
"""How long a site that takes part in no run keeps its place when others need it."""

_FULL_S = 30.0
"""After how long a site that found no place may ask for one again, at the earliest."""

_RESTART_S = 0.5
"""How long a coordinator that is stopped takes to be back, if somebody starts it again at once."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A run to begin: its run.toml as text and as checked, and its initial model."""

    run_toml: str
    config: RunConfig
    model: Model


class Coordinator:
    """Sessions by site and runs by id. All methods belong to the event loop's thread."""

    def __init__(self, settings: ServerSettings, spool: Spool, archive: Archive, keys: Keys) -> None:
        self.settings = settings
        self.spool = spool
        self.uploads = Uploads(spool, max_idle_bytes=settings.max_kept_bytes)
        self.archive = archive
        self._keys = keys
        self.sessions: dict[str, Session] = {}
        self.runs: dict[str, RunDriver] = {}
        self.past: dict[str, PastRun] = {}
        """Runs that no process drives: those that ended before this one, and those that cannot go on here."""
        self.apps = Switchboard(spool, self._send, most=settings.max_runs, is_run=self._is_run)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._when_full = Pace(after_s=_FULL_S)
        self._after_restart = Pace(after_s=_RESTART_S)

    # Sessions.

    def connect(self, session: Session) -> None:
        """A site's stream is up: an older one of the same site ends, and every open run is offered.

        Raises:
            BusyError: there are as many sessions as the operator allows, and all of them are needed.
        """
        old = self.sessions.get(session.site)
        if old is not None:
            old.close("another client connected as this site", replaced=True)
            self.disconnect(old)
        elif len(self.sessions) >= self.settings.max_sessions:
            self._make_room()
        self.sessions[session.site] = session
        log.info("site_connected site=%s session=%d", session.site, session.number)
        for driver in self._open_runs():
            session.send(_offer(driver))
        self.apps.connect(session.site)

    def _make_room(self) -> None:
        """Send the site away that has been idle for longest; it is told when to come back."""
        now = asyncio.get_running_loop().time()
        idle = [
            each
            for each in self.sessions.values()
            if not each.joined and now - each.since >= IDLE_S and not self.apps.needs(each.site)
        ]
        if not idle:
            raise BusyError(
                f"this coordinator has its {self.settings.max_sessions} sessions",
                retry_after_s=self._when_full.return_in_s(now=now),
            )
        oldest = min(idle, key=lambda each: each.since)
        oldest.close("others need the place", retry_after_s=self._when_full.return_in_s(now=now))
        self.disconnect(oldest)

    def disconnect(self, session: Session) -> None:
        """A site's stream is gone; the runs it had joined hear of it."""
        if self.sessions.get(session.site) is not session:
            return
        del self.sessions[session.site]
        for run_id in session.joined:
            self.runs[run_id].leave(session.site)
        self.apps.disconnect(session.site)
        log.info(
            "site_disconnected site=%s session=%d because=%s",
            session.site,
            session.number,
            session.ended_because or "the link is gone",
        )

    def accept(self, session: Session, run_id: str) -> None:
        """A site is ready for a run."""
        driver = self.runs.get(run_id)
        if driver is None:
            return
        if driver.machine.status != "running":
            session.send(driver.ended_message())
        elif run_id not in session.joined:
            session.joined.add(run_id)
            driver.history.refusals.pop(session.site, None)
            driver.join(session.site)
            driver.history.touch()

    def refuse(self, session: Session, run_id: str, refusal: Refusal) -> None:
        """A site will not take part in a run."""
        driver = self.runs.get(run_id)
        if driver is None:
            self.apps.refuse(session.site, run_id, refusal)
            return
        log.warning("run_refused run=%s site=%s reason=%s", run_id, session.site, refusal)
        driver.history.refusals[session.site] = refusal
        driver.history.touch()
        session.joined.discard(run_id)
        driver.leave(session.site)

    def fail(
        self,
        session: Session,
        run_id: str,
        order: OrderId,
        refusal: Refusal,
        culprits: tuple[str, ...] = (),
    ) -> None:
        """A site could not do an order, by its own words because of the messages of `culprits`."""
        driver = self.runs.get(run_id)
        if driver is None or run_id not in session.joined:
            return
        log.warning("order_failed run=%s site=%s order=%s reason=%s", run_id, session.site, order, refusal)
        driver.post(Failed(session.site, order, refusal, culprits))

    # Runs.

    async def submit(self, submission: Submission, *, admin: str = "") -> RunDriver:
        """Begin a run, and offer it to every connected site once it is kept.

        Raises:
            ConfigError: the strategy is unknown or its settings are wrong.
            RunError: there are as many open runs as the operator allows, or there is no directory of keys for its
                secure sums.
            StorageError: the run cannot be kept.
        """
        config, model = submission.config, submission.model
        if len(self._open_runs()) >= self.settings.max_runs:
            raise RunError(f"this coordinator has its {self.settings.max_runs} open runs; stop one first")
        strategy = load_strategy(config, allowed=self.settings.strategies)
        record = RunRecord(
            run_id=f"{config.name}-{secrets.token_hex(4)}",
            name=config.name,
            run_toml=submission.run_toml,
            layout=encode_layout(model.layout).SerializeToString(deterministic=True),
            strategy=repr(strategy),
            submitted_at=time.time(),
            submitted_by=admin,
        )
        try:
            driver = RunDriver.begin(record, config, strategy, model, self._surroundings())
            first = driver.first_moment()
        except ConfigError:
            raise
        except Exception as error:  # a user's strategy may raise anything
            raise ConfigError(
                f"strategy {config.strategy.name!r} cannot begin this run: {type(error).__name__}: {error}"
            ) from error
        if config.secure_aggregation.enabled:
            await self._keys()  # or it says what the operator has to do for there to be any
        self.archive.faults.reach("submit.before")
        await self.archive.call(self.archive.add_run, record, first)
        self.archive.faults.reach("submit.after")
        await self._forget_old_runs()
        self._drive(driver)
        self.archive.note("run_submitted", record.run_id, actor=admin)
        log.info("run_submitted run=%s strategy=%s rounds=%d", record.run_id, record.strategy, config.rounds)
        offer = _offer(driver)
        for session in self.sessions.values():
            session.send(offer)
        return driver

    async def recover(self) -> None:
        """Go on with every run that an earlier process has kept, before any site is served.

        Raises:
            StorageError: the store cannot be read.
        """
        self.archive.faults.reach("recover.before")
        for kept in await self.archive.call(self.archive.store.runs):
            run_id, past = kept.record.run_id, None
            try:
                past = self.past[run_id] = await self.archive.call(PastRun.of, kept, self.archive)
                if kept.progress.status == "running":
                    driver = await self._resumed(kept, past)
                    del self.past[run_id]
                    self._drive(driver)
                    log.info("run_resumed run=%s round=%d", run_id, driver.machine.committed)
            except FedgeError as error:
                log.error("run_not_resumed run=%s reason=%s", run_id, error)
                self._hold(past, str(error))
            except Exception as error:  # a user's strategy may raise anything; the other runs go on
                log.exception("run_not_resumed run=%s", run_id)
                self._hold(past, f"{type(error).__name__}: {error}")
        self.spool.sweep()
        self.archive.faults.reach("recover.after")

    def _hold(self, past: PastRun | None, reason: str) -> None:
        if past is not None:
            self.past[past.run_id] = past.holding(reason)

    async def _resumed(self, kept: KeptRun, past: PastRun) -> RunDriver:
        strategy = load_strategy(past.config, allowed=self.settings.strategies)
        central = Central.of(past.config)
        start = await self.archive.call(
            start_of, kept, strategy, central, past.layout, self.archive, self.spool
        )
        return RunDriver(kept.record, past.config, start, self._surroundings())

    def _drive(self, driver: RunDriver) -> None:
        self.runs[driver.run_id] = driver
        task = self._tasks[driver.run_id] = asyncio.create_task(driver.run(), name=f"run {driver.run_id}")
        task.add_done_callback(lambda _: self._ended(driver))

    def _ended(self, driver: RunDriver) -> None:
        self.uploads.forget_run(driver.run_id)
        if driver.machine.status != "running":
            self.archive.note("run_ended", driver.run_id, detail=driver.machine.status)
        if not self._open_runs():
            self.spool.shrink()

    def _surroundings(self) -> Surroundings:
        return Surroundings(self._send, self.archive, self._keys, self.settings.max_kept_bytes)

    def _is_run(self, run_id: str) -> bool:
        return run_id in self.runs or run_id in self.past

    def all_runs(self) -> list[RunDriver | PastRun]:
        """Those that are over first, then those that are driven here, oldest first."""
        return [*self.past.values(), *self.runs.values()]

    def find(self, run_id: str) -> RunDriver | PastRun:
        """The run of that id.

        Raises:
            RunError: there is none.
        """
        run = self.runs.get(run_id) or self.past.get(run_id)
        if run is None and run_id in self.apps.runs:
            raise RunError(
                f"run {run_id} is a Flower app: its ServerApp's own process has all there is to see"
            )
        if run is None:
            raise RunError(
                f"expected the id of a run on this coordinator, found {run_id[:80]!r}; see fedge run list"
            )
        return run

    def driver(self, run_id: str) -> RunDriver:
        """The run of that id, if it is one that this process drives.

        Raises:
            RunError: it is not.
        """
        if run_id not in self.runs:
            self.find(run_id)
            raise RunError(f"run {run_id} is over, or cannot go on here; see fedge run show")
        return self.runs[run_id]

    def stop(self, run_id: str, *, admin: str = "") -> None:
        """End a run; what it has committed stays."""
        if run_id in self.apps.runs:
            self.apps.end(self.apps.runs[run_id], "stopped", f"stopped by admin {admin}")
            return
        if self.find(run_id).machine.status == "running":
            self.driver(run_id).post(Stop())
            self.archive.note("run_stopped", run_id, actor=admin)

    async def shut_down(self, grace_s: float) -> None:
        """End every session, and every run's task once the run is kept, if that takes no longer than this."""
        now = asyncio.get_running_loop().time()
        self.apps.shut_down()
        for session in list(self.sessions.values()):
            back_in_s = self._after_restart.return_in_s(now=now)
            session.close("the coordinator is shutting down", retry_after_s=back_in_s)
        for driver in self.runs.values():
            driver.drain()
        tasks = [task for task in self._tasks.values() if not task.done()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                log.error("run_not_kept %s: its last moments will be done again", task.get_name())
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _open_runs(self) -> list[RunDriver]:
        return [driver for driver in self.runs.values() if driver.machine.status == "running"]

    async def _forget_old_runs(self) -> None:
        """Runs that are over leave memory when others come and, past so many, the store as well."""
        for run_id, driver in [(run_id, driver) for run_id, driver in self.runs.items() if driver.over]:
            kept = await self.archive.call(self.archive.store.run, run_id)
            past = await self.archive.call(PastRun.of, kept, self.archive)
            past.history.refusals.update(driver.history.refusals)  # which no store has
            self.past[run_id] = past
            del self.runs[run_id]
            self._tasks.pop(run_id, None)
            for session in self.sessions.values():
                session.joined.discard(run_id)
        ended = sorted(
            (past for past in self.past.values() if not past.held), key=lambda past: past.kept.ended_at or 0
        )
        for oldest in ended[: max(0, len(ended) - self.settings.max_finished_runs)]:
            await self.archive.call(self.archive.forget, oldest.run_id)
            del self.past[oldest.run_id]

    def _send(self, site: str, message: pb.ServerMessage) -> None:
        session = self.sessions.get(site)
        if session is not None:
            session.send(message)


def _offer(driver: RunDriver) -> pb.ServerMessage:
    return pb.ServerMessage(offer=driver.offer)
