"""What the two sides of a Flower app exchange, as plain values: messages of named records.

The names are Flower's (`flwr.app`), of which nothing is imported here: a coordinator passes messages on without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, unique
from typing import Final

from fedge.errors import RemoteProtocolError
from fedge.seeds import derive_seed

Number = int | float
Value = bool | Number | str | bytes
Buffer = bytes | bytearray | memoryview

MAX_NODES_OF_A_SITE: Final = 1024

APP_NAME: Final = re.compile(r"[^\s/]{1,100}/[^\s/]{1,100}")
"""Of an app: publisher/project."""

NATIVE: Final = ""
"""The `stype` of an array whose data are its elements: little-endian, in C order."""

DTYPES: Final[Mapping[str, int]] = {
    **{f"int{bits}": bits // 8 for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": bits // 8 for bits in (8, 16, 32, 64)},
    **{f"float{bits}": bits // 8 for bits in (16, 32, 64)},
    "bfloat16": 2,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of an element."""


@dataclass(frozen=True, slots=True, eq=False)
class RawArray:
    """An array: its elements if `stype` is NATIVE, else whatever the app's own serialisation has made of it.

    Raises:
        ValueError: the data are not as long as dtype and shape say, or the dtype is none of DTYPES.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Buffer
    stype: str = NATIVE

    def __post_init__(self) -> None:
        if self.stype != NATIVE:
            return
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, found {self.dtype[:40]!r}")
        size = math.prod(self.shape) * DTYPES[self.dtype]
        if any(axis < 0 for axis in self.shape) or self.nbytes != size:
            raise ValueError(f"expected {size} bytes of {self.dtype}{list(self.shape)}, found {self.nbytes}")

    @property
    def nbytes(self) -> int:
        return self.data.nbytes if isinstance(self.data, memoryview) else len(self.data)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayRecord:
    """Arrays by name, in order: a model, say."""

    arrays: Mapping[str, RawArray]


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """Numbers and lists of numbers by name."""

    metrics: Mapping[str, Number | list[int] | list[float]]


@dataclass(frozen=True, slots=True)
class ConfigRecord:
    """Settings by name."""

    configs: Mapping[str, Value | list[bool] | list[int] | list[float] | list[str] | list[bytes]]


Record = ArrayRecord | MetricRecord | ConfigRecord
Content = Mapping[str, Record]


@unique
class ErrorCode(IntEnum):
    """Flower's codes of errors, those that nodes have for us."""

    UNKNOWN = 0
    LOAD_CLIENT_APP_EXCEPTION = 1
    CLIENT_APP_RAISED_EXCEPTION = 2
    MESSAGE_UNAVAILABLE = 3
    NODE_UNAVAILABLE = 5
    CLIENT_APP_CRASHED = 8


@dataclass(frozen=True, slots=True)
class AppError:
    """Why a node has no content for a reply; `code` is one of Flower's."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class AppMessage:
    """An instruction to a node, or, with the id of one in `reply_to`, what came of it.

    `kind` is "train", "evaluate" or "query", or one of them with an action ("train.fast"). `group` is free: a round,
    for instance. Times are in seconds, `created_at` since the epoch; after `ttl` nobody wants it any more.
    """

    id: str
    kind: str
    node: int
    content: Content | AppError
    group: str = ""
    reply_to: str = ""
    created_at: float = 0.0
    ttl: float = 0.0
    src: int = field(default=0)
    """The node that it is from; the app's own server is 1."""


def reply_to(message: AppMessage, content: Content | AppError, *, now: float) -> AppMessage:
    """What comes back for a message, from its node to the app's server; `now` in seconds since the epoch."""
    return replace(
        message,
        id=f"{message.id}/reply",
        reply_to=message.id,
        node=message.src,
        src=message.node,
        content=content,
        created_at=now,
        ttl=max(0.0, message.ttl - (now - message.created_at)),
    )


def check_settings(values: Mapping[str, object]) -> None:
    """
    Raises:
        RemoteProtocolError: one is no number, text or truth value.
    """
    for name, value in values.items():
        if not isinstance(value, bool | int | float | str):
            raise RemoteProtocolError(
                f"expected an app's settings to be numbers, texts, true or false, found a {type(value).__name__} "
                f"for {name[:80]!r}"
            )


def node_id(site: str, at: int) -> int:
    """The id of a site's node number `at`: the same in every app, for ever."""
    return derive_seed(0, "flower node", site, at) or 1


def run_number(run_id: str) -> int:
    """What an app finds in `context.run_id`."""
    return derive_seed(0, "flower run", run_id)
