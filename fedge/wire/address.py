"""HOST:PORT, as people type it and as gRPC wants it."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """The host (an IPv6 address without its brackets) and the port.

    Raises:
        ValueError: it is not HOST:PORT with a port up to 65535.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"expected HOST:PORT, found {address!r}")
    return match["host"].strip("[]"), int(match["port"])


def check_address(address: str) -> str:
    """Return `address` if it is HOST:PORT; raises as `split_address` does."""
    split_address(address)
    return address
