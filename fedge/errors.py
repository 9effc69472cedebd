"""The error tree: whose fault it is, is its type.

    FedgeError
    ├── ConfigError             a file, key, flag or combination of them is wrong
    │   └── StorageError        a file or folder of ours cannot be written
    ├── TaskError               the task code cannot be imported, has no data or fails
    ├── LayoutError             a model, vector or checkpoint does not fit a layout
    ├── ProtocolError
    │   ├── LocalProtocolError  this side broke the protocol: a defect in this program
    │   └── RemoteProtocolError the peer broke it: its bytes are refused
    │       └── LimitError      the peer's message is larger than the cap
    ├── IdentityError           a key, certificate or token is missing, wrong, used or expired
    ├── LinkError               the peer cannot be reached, or the link broke
    │   └── BusyError           the peer has no room now, and says when to come back
    ├── RefusedError            a policy or a peer said no; carries a typed `Refusal`
    │   └── BlamedError         what others have sent makes this impossible, and whose it was
    └── RunError                a run cannot go on

Every message says what was expected, what was found and what to do. `exit_code` is what the
command line returns for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedge.refusal import Refusal


class FedgeError(Exception):
    """The root of everything that fedge raises on purpose."""

    exit_code = 1


class ConfigError(FedgeError):
    """A file, key, flag or combination of them is wrong."""

    exit_code = 2


class StorageError(ConfigError):
    """A file or folder of ours cannot be written: read-only, full, or not there."""


class TaskError(FedgeError):
    """The task code cannot be imported, has no data, or fails while it runs."""

    exit_code = 3


class LayoutError(FedgeError):
    """A model, vector or checkpoint does not fit a layout."""

    exit_code = 3


class ProtocolError(FedgeError):
    """The protocol between two peers was broken."""

    exit_code = 4


class LocalProtocolError(ProtocolError):
    """This side broke the protocol: a defect in this program, never the peer's doing."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; its bytes are refused and nothing else is affected."""


class LimitError(RemoteProtocolError):
    """The peer's message is larger than the cap; it was refused before anything was allocated."""


class LinkError(FedgeError):
    """The peer cannot be reached, or the link broke."""

    exit_code = 4


class BusyError(LinkError):
    """The peer has no room for this now; `retry_after_s` is when it would like to be asked again."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IdentityError(FedgeError):
    """A key, certificate or token is missing, wrong, used or expired."""

    exit_code = 5


class RefusedError(FedgeError):
    """A policy or a peer said no.

    `refusal` carries the machine-readable reason that crosses the wire.
    """

    exit_code = 6

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class BlamedError(RefusedError):
    """What others have sent makes this impossible; `culprits` are those whose it was."""

    def __init__(self, refusal: Refusal, culprits: Iterable[str]) -> None:
        super().__init__(refusal)
        self.culprits = tuple(culprits)


class RunError(FedgeError):
    """A run cannot go on: too few clients, or too many failed attempts at one round."""
