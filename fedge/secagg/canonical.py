"""Byte layouts of everything that is signed, hashed or authenticated: injective, and never a re-serialised message.

A layout is the domain `fedge-sa/1 <what>` and its fields, each with its length before it. Numbers are 8 bytes.
"""

from __future__ import annotations

import hashlib
import struct

DOMAIN = "fedge-sa/1"
DIGEST_BYTES = 32

Field = bytes | str | int


def layout(what: str, *fields: Field) -> bytes:
    """The bytes that stand for these fields, and for no others.

    Raises:
        ValueError: a number is not in [0, 2^64).
    """
    parts = [f"{DOMAIN} {what}".encode(), *(_encoded(field) for field in fields)]
    return struct.pack("<I", len(parts)) + b"".join(struct.pack("<I", len(part)) + part for part in parts)


def digest(what: str, *fields: Field) -> bytes:
    """SHA-256 of a layout: 32 bytes."""
    return hashlib.sha256(layout(what, *fields)).digest()


def bitmap(members: list[bool]) -> bytes:
    """One bit for each, lowest first: for n members (n + 7) // 8 bytes."""
    return sum(1 << at for at, member in enumerate(members) if member).to_bytes(
        (len(members) + 7) // 8, "little"
    )


def members_of(data: bytes, count: int) -> frozenset[int]:
    """The numbers, from 1, of the bits that are set in a bitmap of `count` members.

    Raises:
        ValueError: it is of another size, or has bits beyond.
    """
    bits = int.from_bytes(data, "little")
    if len(data) != (count + 7) // 8 or bits >> count:
        raise ValueError(f"expected a bit for each of {count} members, found {len(data)} bytes")
    return frozenset(number for number in range(1, count + 1) if bits >> (number - 1) & 1)


def _encoded(field: Field) -> bytes:
    if isinstance(field, int):
        if not 0 <= field < 1 << 64:
            raise ValueError(f"expected a number from 0 to 2^64 - 1, found {field}")
        return struct.pack("<Q", field)
    return field.encode() if isinstance(field, str) else bytes(field)
