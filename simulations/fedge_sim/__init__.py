"""The simulator: the deployed rounds, strategies and trainers, for many clients in one process."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedge_sim.engine import simulate
    from fedge_sim.result import Result
    from fedge_sim.sweep import sweep

__all__ = ["Result", "simulate", "sweep"]

_HOMES = {"Result": "fedge_sim.result", "simulate": "fedge_sim.engine", "sweep": "fedge_sim.sweep"}


def __getattr__(name: str) -> Any:
    """Imported when asked for: the command line must not pay for torch before it has work for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found  # a module of the same name is an attribute by now
    return found
