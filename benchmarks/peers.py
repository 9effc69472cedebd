"""What others have written is measured by the interpreter that FEDGE_PEERS names, or else by this one, if it has it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.processes import CrashError, module, run_text

_DEADLINE_S = 900.0


def by_peers(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of ours there."""
    return [os.environ.get("FEDGE_PEERS") or sys.executable, *module(name, *arguments)[1:]]


@cache
def is_installed(name: str, *arguments: object) -> bool:
    """Whether a module of ours, told `has`, finds there what it measures."""
    with TemporaryDirectory() as folder:
        try:
            run_text(by_peers(name, "has", *arguments), log=Path(folder) / "log", deadline_s=_DEADLINE_S)
        except CrashError:
            return False
    return True


def missing(there: Mapping[str, bool]) -> str:
    """What a case's title says of those that are not there."""
    names = [name for name, is_there in there.items() if not is_there]
    return f" ({' and '.join(names)} not installed)" if names else ""
