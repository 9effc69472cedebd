"""S1 and S2: one mask on one vector, and two secrets that are shared and rebuilt.

    python -m benchmarks.secure_parts mask|shamir [--size N] [--shares N] [--threshold N] [--repeat N]

Prints {"seconds": [...]}, of one core.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable

import numpy as np

from benchmarks.floors.secure import only_cores, print_seconds
from fedge.privacy.secure import SecureSource
from fedge.secagg import shamir
from fedge.secagg.masks import apply_masks


def mask(given: argparse.Namespace) -> Callable[[], None]:
    vector, key = np.zeros(given.size, np.uint32), secrets.token_bytes(32)
    return lambda: apply_masks(vector, add=[key])


def sharing(given: argparse.Namespace) -> Callable[[], None]:
    wanted = [secrets.token_bytes(32) for _ in range(2)]
    source, points = SecureSource(secrets.token_bytes(32)), list(range(1, given.threshold + 1))

    def once() -> None:
        shares = shamir.split(wanted, shares=given.shares, threshold=given.threshold, source=source)
        assert shamir.rebuild(points, shares[: given.threshold]) == wanted

    return once


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("mask", "shamir"))
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--shares", type=int, default=100)
    parser.add_argument("--threshold", type=int, default=67)
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()
    only_cores(1)
    print_seconds({"mask": mask, "shamir": sharing}[given.what](given), given.repeat)


if __name__ == "__main__":
    main()
