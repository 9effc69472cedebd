"""Starts and stops the coordinator: one port, mutual TLS, everything shut down in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc import aio

import fedge
from fedge.errors import ConfigError
from fedge.faults import Faults
from fedge.files import exclusive, private_folder
from fedge.memory import use_one_arena
from fedge.wire.address import split_address
from fedge.wire.limits import CHANNEL_OPTIONS
from fedge_server.admin import AdminService
from fedge_server.archive import Archive
from fedge_server.clock import now
from fedge_server.coordinator import Coordinator
from fedge_server.handlers import add_services
from fedge_server.identity import Authority
from fedge_server.membership import Membership
from fedge_server.service import EnrolmentService, FederationService
from fedge_server.settings import ServerSettings
from fedge_server.spool import Spool
from fedge_server.state import authority_of, database_of, state_folder
from fedge_server.store.store import Store
from fedge_server.witnesses import Witnesses

log = logging.getLogger(__name__)

_SETTLE_S = 1.0

_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second coordinator on the same port must fail, not share it
    # A stream's sender may be so far ahead of its reader, and no further, however fast the link: without
    # this gRPC lets the window grow, and with it the memory of each upload.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    # A dead peer (a cut cable, a stopped process) is noticed within a minute on an idle stream.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # what decides; a minute unless it is set
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Whoever opens a connection and says nothing, or opens ever more calls on one, gets no further.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 64),
)


async def serve(settings: ServerSettings, folder: Path, *, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is called with the port once calls are answered.

    Raises:
        ConfigError: a file is missing, or the port cannot be had.
        IdentityError: the authority's files are damaged or the server's certificate has expired.
    """
    use_one_arena()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_in_one_line)
    faults = Faults.of(os.environ)
    if faults.armed:
        log.warning("fault_armed point=%s", faults.armed)
    spool = private_folder(folder / settings.spool)
    _check_writable(spool)
    state = state_folder(settings, folder)
    database = database_of(settings, folder, faults)
    with exclusive(state):
        database.open()
        try:
            authority = authority_of(settings, folder, database)
            authority.directories.settle(now=now())
            archive = Archive(Store(database), state / "checkpoints", faults)
            membership = Membership(authority)
            coordinator = Coordinator(settings, Spool(spool), archive, membership.directory)
            await _serve(settings, authority, membership, coordinator, ready)
        finally:
            database.close()


async def _serve(
    settings: ServerSettings,
    authority: Authority,
    membership: Membership,
    coordinator: Coordinator,
    ready: Callable[[int], None],
) -> None:
    server = aio.server(options=_OPTIONS)
    software = f"fedge {fedge.__version__}"
    witnesses = Witnesses(authority.registry)
    federation = FederationService(coordinator, membership, witnesses, software=software)
    enrolment = EnrolmentService(coordinator, membership)
    credential = authority.server_credential(now=now())
    add_services(server, federation, enrolment, AdminService(coordinator, membership, credential))
    credentials = grpc.ssl_server_credentials(
        [(credential.key_pem, credential.certificate_pem)],
        root_certificates=authority.ca_pem,
        require_client_auth=True,
    )
    port = _bind(server, settings.listen, credentials)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await coordinator.recover()
    await server.start()
    try:
        log.info(
            "coordinator_started listen=%s port=%d federation=%s", settings.listen, port, authority.federation
        )
        ready(port)
        await stop.wait()
        log.info("coordinator_stopping")
    finally:
        await coordinator.shut_down(settings.shutdown_grace_s)
        await server.stop(settings.shutdown_grace_s)
        await _settle()
        coordinator.archive.close()
        membership.close()
        witnesses.close()
        log.info("coordinator_stopped")


async def _settle() -> None:
    """gRPC's tasks end a moment after it says that it has stopped; cut off then, each would log a traceback."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_SETTLE_S)


def _in_one_line(record: logging.LogRecord) -> bool:
    """gRPC logs a traceback when a peer is gone while something is sent to it; to us that is a line."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and type(error).__module__.startswith("grpc"):
        record.exc_info = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


def _bind(server: aio.Server, listen: str, credentials: grpc.ServerCredentials) -> int:
    host, _ = split_address(listen)
    try:
        port = server.add_secure_port(listen, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(
            f"listen: expected an address that is free on this machine, found {listen!r} in use or not "
            f"bindable; stop what listens there, or choose another port (host {host!r})"
        )
    return port


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"spool: expected a folder that can be written, found {folder}: {error.strerror}"
        ) from None
