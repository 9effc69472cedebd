"""A ledger's records as lines of canonical JSON, each with the hash of the line before it.

Reading is strict: a line must be, to the byte, the one that `encode` would write. No file is opened here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, get_args

from fedge.events import OrderId
from fedge.privacy.config import Protected
from fedge.privacy.ledger import Commit, Record, Release, Reserve, Sending, Trusted, Unprotected
from fedge.privacy.mechanism import from_table, to_table
from fedge.strategy import WorkKind

FORMAT: Final = "fedge-ledger"
VERSION: Final = 1
MAX_LINE_BYTES: Final = 4096
"""Its newline included."""
NONCE_BYTES: Final = 16

_FIELDS: Final = frozenset({"at", "delta", "epsilon", "hash", "kind", "previous", "seq"})
_HASH_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Header:
    """A ledger's first line, with `seq` 0. The random `nonce` makes its hashes say nothing of its content."""

    dataset: str
    created: datetime
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Line:
    """A record in its place. `epsilon` is what is spent after it at `delta`; None where nothing bounds it."""

    seq: int
    previous: bytes
    at: datetime
    delta: float
    epsilon: float | None
    record: Record


def encode_header(header: Header) -> tuple[bytes, bytes]:
    """The line, newline included, and its hash."""
    return _seal(
        {
            "format": FORMAT,
            "version": VERSION,
            "dataset": header.dataset,
            "created": _stamp(header.created),
            "nonce": header.nonce.hex(),
        }
    )


def decode_header(line: bytes) -> tuple[Header, bytes]:
    """The header and its hash.

    Raises:
        ValueError: the line is not exactly one that `encode_header` writes.
    """
    table = _parse(line)
    if table.get("format") != FORMAT:
        raise ValueError(f"expected the header of a {FORMAT}, found another line")
    if table.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION}, found another; use the version of fedge that wrote it")
    header = Header(_text(table, "dataset"), _time(table, "created"), _hex(table, "nonce", NONCE_BYTES))
    return header, _same(line, encode_header(header))


def encode(line: Line) -> tuple[bytes, bytes]:
    """The line, newline included, and its hash: the SHA-256 of the same line without the key `hash`.

    Raises:
        ValueError: it would be longer than MAX_LINE_BYTES.
    """
    return _seal(
        {
            "seq": line.seq,
            "previous": line.previous.hex(),
            "at": _stamp(line.at),
            "delta": line.delta,
            "epsilon": line.epsilon,
            **_to_table(line.record),
        }
    )


def decode(line: bytes) -> tuple[Line, bytes]:
    """The record in its place, and its hash.

    Raises:
        ValueError: the line is not exactly one that `encode` writes: an unknown kind, a missing, unknown or
            ill-typed field, a number that is none, a byte that was changed.
    """
    table = _parse(line)
    kind = table.get("kind")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise ValueError(f"expected one of the kinds {', '.join(_READERS)}, found another")
    fields = {name: value for name, value in table.items() if name not in _FIELDS}
    epsilon = None if table.get("epsilon") is None else _number(table, "epsilon")
    decoded = Line(
        _whole(table, "seq"),
        _hex(table, "previous", _HASH_BYTES),
        _time(table, "at"),
        _number(table, "delta"),
        epsilon,
        reader(fields),
    )
    return decoded, _same(line, encode(decoded))


def encode_head(seq: int, digest: bytes) -> bytes:
    """What the head file holds: the number and the hash of the ledger's last line."""
    return _canonical({"seq": seq, "hash": digest.hex()}) + b"\n"


def decode_head(data: bytes) -> tuple[int, bytes]:
    """`(seq, hash)`.

    Raises:
        ValueError: it is not exactly what `encode_head` writes.
    """
    table = _parse(data)
    seq, digest = _whole(table, "seq"), _hex(table, "hash", _HASH_BYTES)
    if encode_head(seq, digest) != data:
        raise ValueError("expected a head to the byte as this program writes it, found another")
    return seq, digest


def _to_table(record: Record) -> dict[str, Any]:
    match record:
        case Reserve(entry, run_id, order, unit, mechanism):
            named = {"kind": order.kind, "round": order.round, "attempt": order.attempt}
            fields = {
                "entry": entry,
                "run_id": run_id,
                "order": named,
                "unit": unit,
                "mechanism": to_table(mechanism),
            }
        case Commit(entry, mechanism):
            fields = {"entry": entry, "mechanism": to_table(mechanism)}
        case Sending(entry) | Release(entry):
            fields = {"entry": entry}
        case Unprotected(run_id):
            fields = {"run_id": run_id}
        case Trusted(reason):
            fields = {"reason": reason}
    return {"kind": record.kind, **fields}


def _order(table: Mapping[str, Any]) -> OrderId:
    order = _table(table, "order")
    kind = _text(order, "kind")
    if kind not in get_args(WorkKind):
        raise ValueError(f"order.kind: expected one of {', '.join(get_args(WorkKind))}, found another")
    return OrderId(kind, _whole(order, "round"), _whole(order, "attempt"))  # type: ignore[arg-type]  # checked


def _unit(table: Mapping[str, Any]) -> Protected:
    unit = _text(table, "unit")
    if unit not in get_args(Protected):
        raise ValueError(f"unit: expected one of {', '.join(get_args(Protected))}, found another")
    return unit  # type: ignore[return-value]  # checked


# An unknown field is not in what is read, so that the line encoded again differs from the line.
_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Record]]] = {
    "reserve": lambda table: Reserve(
        _whole(table, "entry"),
        _text(table, "run_id"),
        _order(table),
        _unit(table),
        from_table(_table(table, "mechanism")),
    ),
    "sending": lambda table: Sending(_whole(table, "entry")),
    "commit": lambda table: Commit(_whole(table, "entry"), from_table(_table(table, "mechanism"))),
    "release": lambda table: Release(_whole(table, "entry")),
    "unprotected": lambda table: Unprotected(_text(table, "run_id")),
    "trusted": lambda table: Trusted(_text(table, "reason")),
}


def _canonical(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _seal(table: dict[str, Any]) -> tuple[bytes, bytes]:
    digest = hashlib.sha256(_canonical(table)).digest()
    line = _canonical({**table, "hash": digest.hex()}) + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"expected a record of at most {MAX_LINE_BYTES} bytes, found {len(line)}")
    return line, digest


def _same(line: bytes, encoded: tuple[bytes, bytes]) -> bytes:
    again, digest = encoded
    if again != line:
        raise ValueError(
            "expected a line to the byte as this program writes it, with its own hash, found another"
        )
    return digest


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"expected at most {MAX_LINE_BYTES} bytes, found more")
    try:
        table = json.loads(line.decode("ascii"), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("expected a flat table, found one that is nested too deeply") from None
    except ValueError:  # its own message would quote the line
        raise ValueError("expected a line of JSON, found something else") from None
    if not isinstance(table, dict):
        raise ValueError("expected a table, found something else")
    return table


def _no_number(name: str) -> float:
    raise ValueError(f"expected a number, found {name}")


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _time(table: Mapping[str, Any], name: str) -> datetime:
    return datetime.strptime(_text(table, name), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _text(table: Mapping[str, Any], name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, found something else")
    return value


def _whole(table: Mapping[str, Any], name: str) -> int:
    value = table.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name}: expected a whole number, found something else")
    return value


def _number(table: Mapping[str, Any], name: str) -> float:
    value = table.get(name)
    if type(value) is not float or value < 0:
        raise ValueError(f"{name}: expected a number of 0 or more, found something else")
    return value


def _hex(table: Mapping[str, Any], name: str, size: int) -> bytes:
    value = bytes.fromhex(_text(table, name))
    if len(value) != size:
        raise ValueError(f"{name}: expected {size} bytes in hexadecimal, found {len(value)}")
    return value


def _table(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = table.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a table, found something else")
    return value
