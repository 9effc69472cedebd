"""What the coordinator holds: connected sites and runs, and who of the first takes part in which."""

from __future__ import annotations

import asyncio
import logging
import secrets

from fedge.errors import ConfigError, RunError
from fedge.federation import Stop
from fedge.refusal import Refusal
from fedge.round import Failed, Joined, Left, OrderId
from fedge.run import RunConfig
from fedge.strategy import load_strategy
from fedge.vector import Model
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_layout, encode_work
from fedge_server.driver import RunDriver
from fedge_server.sessions import Session
from fedge_server.settings import ServerSettings
from fedge_server.spool import Spool

log = logging.getLogger(__name__)


class Coordinator:
    """Sessions by site and runs by id. All methods belong to the event loop's thread."""

    def __init__(self, settings: ServerSettings, spool: Spool) -> None:
        self.settings = settings
        self.spool = spool
        self.sessions: dict[str, Session] = {}
        self.runs: dict[str, RunDriver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    # Sessions.

    def connect(self, session: Session) -> None:
        """A site's stream is up: an older one of the same site ends, and every open run is offered.

        Raises:
            RunError: there are as many sessions as the operator allows.
        """
        old = self.sessions.get(session.site)
        if old is not None:
            old.close("another client connected as this site", replaced=True)
            self.disconnect(old)
        elif len(self.sessions) >= self.settings.max_sessions:
            raise RunError(f"this coordinator has its {self.settings.max_sessions} sessions; try later")
        self.sessions[session.site] = session
        log.info("site_connected site=%s session=%d", session.site, session.number)
        for driver in self._open_runs():
            session.send(_offer(driver))

    def disconnect(self, session: Session) -> None:
        """A site's stream is gone; the runs it had joined hear of it."""
        if self.sessions.get(session.site) is not session:
            return
        del self.sessions[session.site]
        for run_id in session.joined:
            self.runs[run_id].post(Left(session.site))
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
            driver.post(Joined(session.site))
            driver.history.touch()

    def refuse(self, session: Session, run_id: str, refusal: Refusal) -> None:
        """A site will not take part in a run."""
        driver = self.runs.get(run_id)
        if driver is None:
            return
        log.warning("run_refused run=%s site=%s reason=%s", run_id, session.site, refusal)
        driver.history.refusals[session.site] = refusal
        driver.history.touch()
        if run_id in session.joined:
            session.joined.discard(run_id)
            driver.post(Left(session.site))

    def fail(self, session: Session, run_id: str, order: OrderId, refusal: Refusal) -> None:
        """A site could not do an order."""
        driver = self.runs.get(run_id)
        if driver is None or run_id not in session.joined:
            return
        log.warning("order_failed run=%s site=%s order=%s reason=%s", run_id, session.site, order, refusal)
        driver.post(Failed(session.site, order, refusal))

    # Runs.

    def submit(self, config: RunConfig, model: Model) -> RunDriver:
        """Begin a run and offer it to every connected site.

        Raises:
            ConfigError: the strategy is unknown or its settings are wrong.
            RunError: there are as many open runs as the operator allows.
        """
        if len(self._open_runs()) >= self.settings.max_runs:
            raise RunError(f"this coordinator has its {self.settings.max_runs} open runs; stop one first")
        strategy = load_strategy(config.strategy, config.work, allowed=self.settings.strategies)
        run_id = f"{config.name}-{secrets.token_hex(4)}"
        try:
            driver = RunDriver(run_id, config, strategy, model, outbox=self._send)
        except Exception as error:  # a user's strategy may raise anything
            raise ConfigError(
                f"strategy {config.strategy.name!r} cannot begin this run: {type(error).__name__}: {error}"
            ) from error
        self._forget_old_runs()
        self.runs[run_id] = driver
        task = self._tasks[run_id] = asyncio.create_task(driver.run(), name=f"run {run_id}")
        task.add_done_callback(lambda _: self._free_spool())
        log.info("run_submitted run=%s strategy=%s rounds=%d", run_id, driver.strategy_repr, config.rounds)
        offer = _offer(driver)
        for session in self.sessions.values():
            session.send(offer)
        return driver

    def find(self, run_id: str) -> RunDriver:
        """The run of that id.

        Raises:
            RunError: there is none.
        """
        driver = self.runs.get(run_id)
        if driver is None:
            raise RunError(
                f"expected the id of a run on this coordinator, found {run_id[:80]!r}; see fedge run list"
            )
        return driver

    def stop(self, run_id: str) -> None:
        """End a run; what it has committed stays."""
        self.find(run_id).post(Stop())

    async def shut_down(self) -> None:
        """End every session and every run's task."""
        for session in list(self.sessions.values()):
            session.close("the coordinator is shutting down")
        for run_id, task in self._tasks.items():
            if not task.done():
                log.warning("run_interrupted run=%s round=%d", run_id, self.runs[run_id].machine.committed)
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _open_runs(self) -> list[RunDriver]:
        return [driver for driver in self.runs.values() if driver.machine.status == "running"]

    def _free_spool(self) -> None:
        if not self._open_runs():
            self.spool.shrink()

    def _forget_old_runs(self) -> None:
        ended = [run_id for run_id, driver in self.runs.items() if driver.machine.status != "running"]
        for run_id in ended[: max(0, len(ended) - self.settings.max_finished_runs + 1)]:
            del self.runs[run_id]
            self._tasks.pop(run_id, None)
            for session in self.sessions.values():
                session.joined.discard(run_id)

    def _send(self, site: str, message: pb.ServerMessage) -> None:
        session = self.sessions.get(site)
        if session is not None:
            session.send(message)


def _offer(driver: RunDriver) -> pb.ServerMessage:
    config = driver.config
    return pb.ServerMessage(
        offer=pb.Offer(
            run_id=driver.run_id,
            name=config.name,
            task=config.task,
            strategy=driver.strategy_repr,
            rounds=config.rounds,
            seed=config.seed,
            work=encode_work(config.work),
            layout=encode_layout(driver.layout),
            clip=config.privacy.clip,
        )
    )
