"""The simulator: the deployed rounds, strategies and trainers, for many clients in one process."""

from fedge_sim.engine import simulate
from fedge_sim.result import Result

__all__ = ["Result", "simulate"]
