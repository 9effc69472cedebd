"""Which of our errors is which gRPC status, by name, so that both ends agree without gRPC in the core."""

from __future__ import annotations

import math
from typing import Final

from fedge.errors import (
    BusyError,
    ConfigError,
    FedgeError,
    IdentityError,
    LimitError,
    LinkError,
    RemoteProtocolError,
    RunError,
    StorageError,
)
from fedge.wire.codec import printable

RETRY_AFTER: Final = "fedge-retry-after-s"
"""The trailing metadata in which a busy peer says, in seconds, when it would like to be asked again."""

_MAX_RETRY_AFTER_S: Final = 3600.0

_STATUS: tuple[tuple[type[FedgeError], str], ...] = (
    (BusyError, "UNAVAILABLE"),
    (StorageError, "INTERNAL"),
    (IdentityError, "PERMISSION_DENIED"),
    (LimitError, "RESOURCE_EXHAUSTED"),
    (RemoteProtocolError, "INVALID_ARGUMENT"),
    (ConfigError, "INVALID_ARGUMENT"),
    (RunError, "FAILED_PRECONDITION"),
)

# What the peer calls a bad argument is, on this side, something that its user can change.
_ERRORS: dict[str, type[FedgeError]] = {
    "PERMISSION_DENIED": IdentityError,
    "RESOURCE_EXHAUSTED": LimitError,
    "INVALID_ARGUMENT": ConfigError,
    "FAILED_PRECONDITION": RunError,
}

_TLS_HINTS = ("ssl", "tls", "certificate", "handshake", "alert")

_BROKEN_HINTS = (
    "shutdown",
    "shutting down",
    "closing",
    "timed out",
    "timeout",
    "refused",
    "reset",
    "unreachable",
)
"""A handshake that the link broke off says nothing about certificates."""


def status_of(error: FedgeError) -> str:
    """The name of the gRPC status that says this kind of error."""
    return next((name for kind, name in _STATUS if isinstance(error, kind)), "INTERNAL")


def error_of(status: str, details: str, *, peer: str, retry_after: str | bytes | None = None) -> FedgeError:
    """The error that a gRPC status from `peer` (HOST:PORT) means on this side.

    `retry_after` is what the trailing metadata say under `RETRY_AFTER`.
    """
    details = printable(details)
    if status == "UNAVAILABLE" and retry_after is not None:
        return BusyError(
            f"the coordinator at {peer} is busy: {details}", retry_after_s=retry_after_s(retry_after)
        )
    if status in _ERRORS:
        return _ERRORS[status](details)
    if status == "UNAVAILABLE":
        lower = details.lower()
        if any(hint in lower for hint in _TLS_HINTS) and not any(hint in lower for hint in _BROKEN_HINTS):
            return IdentityError(
                f"no trusted connection to the coordinator at {peer}: its certificate is not of the CA given, "
                f"does not name this host, or it refuses ours (foreign or expired) [{details}]"
            )
        return LinkError(
            f"cannot reach the coordinator at {peer}: is it running, and is the port open? [{details}]"
        )
    if status == "DEADLINE_EXCEEDED":
        return LinkError(f"the coordinator at {peer} did not answer in time")
    return LinkError(f"the coordinator at {peer} ended the call: {status.lower()}: {details}")


def retry_after_s(wish: float | str | bytes) -> float:
    """When a peer would like to be asked again, in seconds, as far as that is within reason."""
    try:
        seconds = float(wish)
    except ValueError:
        return 1.0
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if math.isfinite(seconds) else 1.0
