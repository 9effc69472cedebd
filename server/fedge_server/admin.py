"""The service that operators call: submit, follow, stop and export runs; see and revoke sites."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import numpy as np

from fedge.config import parse_toml
from fedge.errors import ConfigError, FedgeError, RemoteProtocolError
from fedge.privacy.statement import sign, state
from fedge.run import RunConfig
from fedge.vector import Layout, Model, bytes_of, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.codec import check_blob, decode_layout, encode_layout
from fedge.wire.limits import CHUNK_BYTES, check_size
from fedge_server.apps.app_run import in_short
from fedge_server.apps.conversation import Conversation, Request
from fedge_server.callers import Context, answering, caller, refuse
from fedge_server.coordinator import Coordinator, Submission
from fedge_server.driver import RunDriver
from fedge_server.identity import Credential
from fedge_server.membership import Membership
from fedge_server.past import PastRun
from fedge_server.standing import Site, clients_of, row_of, summary_of

log = logging.getLogger(__name__)

MAX_RUN_TOML_BYTES = 1 << 20
MESSAGE_WAIT_S = 120.0
LOOK_AGAIN_S = 2.0


class AdminService(services.AdminServicer):
    """What the holder of an admin credential may call."""

    def __init__(self, coordinator: Coordinator, membership: Membership, credential: Credential) -> None:
        self._coordinator = coordinator
        self._membership = membership
        self._credential = credential

    @answering
    async def Submit(self, request_iterator: AsyncIterator[pb.SubmitRequest], context: Context) -> pb.RunRef:
        """Begin a run: its run.toml, its model's layout and initial values."""
        admin = await caller(context, self._membership, role="admin")
        try:
            first = await asyncio.wait_for(anext(request_iterator), MESSAGE_WAIT_S)
            if first.WhichOneof("kind") != "submission":
                raise RemoteProtocolError("expected a submission first, found bytes")
            submission = first.submission
            check_size("a run.toml", len(submission.run_toml.encode()), MAX_RUN_TOML_BYTES)
            config = parse_toml(submission.run_toml, RunConfig, source="run.toml")
            layout = decode_layout(submission.layout)
            self._coordinator.settings.limits.check_model(layout.nbytes)
            check_blob(submission.model, expected_bytes=layout.nbytes)
            data = bytearray(layout.nbytes)
            received = 0
            while received < len(data):
                message = await asyncio.wait_for(anext(request_iterator), MESSAGE_WAIT_S)
                check_size("a model", received + len(message.data), len(data))
                data[received : received + len(message.data)] = message.data
                received += len(message.data)
        except (TimeoutError, StopAsyncIteration):
            raise RemoteProtocolError("expected a submission and its model, found only a part") from None
        model = _model(data, layout, digest=submission.model.digest)
        run = Submission(submission.run_toml, config, model)
        driver = await self._coordinator.submit(run, admin=admin.name)
        log.info("run_submitted_by admin=%s run=%s", admin.name, driver.run_id)
        return pb.RunRef(run_id=driver.run_id)

    @answering
    async def List(self, request: pb.ListRequest, context: Context) -> pb.RunList:
        await caller(context, self._membership, role="admin")
        runs = [summary_of(driver) for driver in self._coordinator.all_runs()]
        return pb.RunList(runs=[*runs, *map(in_short, self._coordinator.apps.runs.values())])

    @answering
    async def Show(self, request: pb.RunRef, context: Context) -> pb.RunDetail:
        await caller(context, self._membership, role="admin")
        driver = self._coordinator.find(request.run_id)
        return pb.RunDetail(
            summary=await self._summary(driver),
            run_toml=driver.record.run_toml,
            clients=clients_of(driver),
            history=[row_of(row) for row in driver.history.rows],
            model_bytes=driver.layout.nbytes,
        )

    async def Watch(self, request: pb.RunRef, context: Context) -> AsyncIterator[pb.WatchEvent]:
        """What there is, then what changes, until the run is over."""
        try:
            await caller(context, self._membership, role="admin")
            driver = self._coordinator.find(request.run_id)
        except FedgeError as error:
            await refuse(context, error)
        revision, told = -1, pb.RunSummary()
        while True:
            newest = driver.history.revision
            rows = [row_of(row) for row in driver.history.since(revision)]
            summary = await self._summary(driver)
            if rows or summary != told:
                yield pb.WatchEvent(summary=summary, history=rows)
            revision, told = newest, summary
            if driver.over and driver.machine.status != "running":
                if driver.history.revision == revision:
                    return
            elif driver.over:
                why = (
                    driver.waiting_for if isinstance(driver, PastRun) else "the coordinator is shutting down"
                )
                await context.abort(grpc.StatusCode.UNAVAILABLE, why)
            with suppress(TimeoutError):  # progress within a round is looked up now and then
                await asyncio.wait_for(driver.history.changed_after(revision), LOOK_AGAIN_S)

    @answering
    async def Stop(self, request: pb.RunRef, context: Context) -> pb.Done:
        admin = await caller(context, self._membership, role="admin")
        self._coordinator.stop(request.run_id, admin=admin.name)
        log.info("run_stopped_by admin=%s run=%s", admin.name, request.run_id)
        return pb.Done()

    async def Export(self, request: pb.RunRef, context: Context) -> AsyncIterator[pb.ExportReply]:
        """The model of the last committed round: its layout, then its vector."""
        try:
            await caller(context, self._membership, role="admin")
            run = self._coordinator.find(request.run_id)
            model = run.model if isinstance(run, RunDriver) else await asyncio.to_thread(run.read_model)
        except FedgeError as error:
            await refuse(context, error)
        yield pb.ExportReply(layout=encode_layout(model.layout))
        view = bytes_of(model.vector)
        for start in range(0, len(view), CHUNK_BYTES):
            yield pb.ExportReply(data=bytes(view[start : start + CHUNK_BYTES]))

    @answering
    async def Statement(self, request: pb.RunRef, context: Context) -> pb.StatementReply:
        """What can be said of a run's privacy by now, signed."""
        await caller(context, self._membership, role="admin")
        run = self._coordinator.find(request.run_id)
        cohorts = [row.clients for row in run.history.rows]
        # Its accountant takes a second, and a library to be imported.
        said = await asyncio.to_thread(state, run.config, run.run_id, run.machine.status, cohorts, run.layout)
        encoded = said.encode()
        return pb.StatementReply(
            statement=encoded,
            signature=sign(encoded, key_pem=self._credential.key_pem),
            certificate=self._credential.certificate_pem,
        )

    async def App(  # type: ignore[override]  # contents pass as bytes: see handlers.py
        self, request_iterator: AsyncIterator[Request], context: Context
    ) -> AsyncIterator[pb.AppEvent | bytes]:
        """A Flower app's ServerApp, for as long as it runs: messages for nodes come in, and their replies go out."""
        try:
            admin = await caller(context, self._membership, role="admin")
            limits = self._coordinator.settings.limits
            conversation = Conversation(self._coordinator.apps, request_iterator, limits, admin=admin.name)
            async for event in conversation.run(lambda: list(self._coordinator.sessions)):
                yield event
        except FedgeError as error:
            await refuse(context, error)

    @answering
    async def Sites(self, request: pb.SitesRequest, context: Context) -> pb.SiteList:
        await caller(context, self._membership, role="admin")
        sites = [
            pb.SiteInfo(
                name=site.name,
                connected=site.name in self._coordinator.sessions,
                revoked=site.revoked,
                enrolled_at=site.enrolled_at.timestamp(),
            )
            for site in await self._membership.sites()
        ]
        return pb.SiteList(sites=sites)

    @answering
    async def Revoke(self, request: pb.SiteRef, context: Context) -> pb.Done:
        """Refuse a site from now on, and end its session."""
        admin = await caller(context, self._membership, role="admin")
        await self._membership.revoke(request.name, actor=admin.name)
        session = self._coordinator.sessions.get(request.name)
        if session is not None:
            session.close("the site was revoked")
        log.warning("site_revoked_by admin=%s site=%s", admin.name, request.name)
        return pb.Done()

    async def _sites(self) -> list[Site]:
        """Every site that could take part in a run."""
        connected = self._coordinator.sessions
        return [
            Site(each.name, each.name in connected)
            for each in await self._membership.sites()
            if not each.revoked
        ]

    async def _summary(self, run: RunDriver | PastRun) -> pb.RunSummary:
        """A run in short; who is missing is looked up only if it waits for somebody."""
        return summary_of(run, await self._sites() if run.waiting_for and not run.over else ())


def _model(data: bytearray, layout: Layout, *, digest: bytes) -> Model:
    if digest_of(memoryview(data)) != digest:
        raise RemoteProtocolError("expected a model of the announced digest, found another")
    vector = np.frombuffer(data, np.dtype("<f4"))
    if not np.isfinite(vector).all():
        raise ConfigError("expected an initial model of finite numbers, found NaN or infinity in it")
    return Model(vector, layout)
