"""Which of our errors is which gRPC status, by name, so that both ends agree without gRPC in the core."""

from __future__ import annotations

from fedge.errors import (
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

_STATUS: tuple[tuple[type[FedgeError], str], ...] = (
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


def status_of(error: FedgeError) -> str:
    """The name of the gRPC status that says this kind of error."""
    return next((name for kind, name in _STATUS if isinstance(error, kind)), "INTERNAL")


def error_of(status: str, details: str, *, peer: str) -> FedgeError:
    """The error that a gRPC status from `peer` (HOST:PORT) means on this side."""
    details = printable(details)
    if status in _ERRORS:
        return _ERRORS[status](details)
    if status == "UNAVAILABLE":
        lower = details.lower()
        if any(hint in lower for hint in _TLS_HINTS):
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
