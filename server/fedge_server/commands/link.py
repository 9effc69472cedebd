"""The admin commands' connection to the coordinator: a channel, deadlines, and errors people can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import grpc
import typer

from fedge.files import read_capped
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.limits import CHANNEL_OPTIONS
from fedge.wire.status import error_of
from fedge_server.settings import load_admin

CALL_S = 60.0
_OPTIONS = (
    *CHANNEL_OPTIONS,
    # What takes hours notices a dead link within a minute, and a coordinator that is back at once.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_MAX_PEM_BYTES = 64 << 10

AdminToml = Annotated[
    Path, typer.Option("--admin", metavar="ADMIN.toml", help="The credential that `fedge server init` wrote.")
]


@contextmanager
def admin_link(path: Path) -> Iterator[services.AdminStub]:
    """The coordinator's admin service, for the credential in admin.toml; raises as `admin_channel`."""
    with admin_channel(path) as channel:
        yield services.AdminStub(channel)


@contextmanager
def admin_channel(path: Path) -> Iterator[grpc.Channel]:
    """A channel to the coordinator, for the credential in admin.toml.

    Raises:
        ConfigError, IdentityError, LinkError, RunError: whatever went wrong, in words.
    """
    settings = load_admin(path)
    ca, key, certificate = (
        read_capped(path.parent / name, max_bytes=_MAX_PEM_BYTES)
        for name in (settings.ca, settings.key, settings.certificate)
    )
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(settings.server, credentials, options=_OPTIONS) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            call = cast("grpc.Call", error)  # every error of a call is one
            raise error_of(call.code().name, call.details() or "", peer=settings.server) from None
