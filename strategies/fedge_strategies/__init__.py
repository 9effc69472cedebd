"""Federated algorithms, one file each. They import the core and nothing else."""

from fedge_strategies.fedavg import FedAvg
from fedge_strategies.mirrored_sgd import MirroredSgd
from fedge_strategies.scaffold import Scaffold
from fedge_strategies.sgd import Sgd

__all__ = ["FedAvg", "MirroredSgd", "Scaffold", "Sgd"]
