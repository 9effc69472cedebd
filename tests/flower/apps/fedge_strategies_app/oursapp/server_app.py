"""fedge's strategies, one after the other, each from the same arrays."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

from fedge_strategies import FedAvg, MirroredSgd, Sgd
from fedge_strategies.flower import InFlower

app = ServerApp()

OURS = {
    "mean": FedAvg(),
    "slower": FedAvg(server_learning_rate=0.5),
    "median": FedAvg(aggregation="median"),
    "trimmed": FedAvg(aggregation="trimmed_mean", trim=0.25),
    "mirrored": MirroredSgd(learning_rate=0.1),
    "adam": MirroredSgd(optimizer="adam", learning_rate=0.1),
    "sgd": Sgd(learning_rate=0.05, momentum=0.0),
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategies = {
        name: InFlower(each, min_train_nodes=4, min_available_nodes=4) for name, each in OURS.items()
    } | {"flowers": FlowersFedAvg(min_train_nodes=4, min_available_nodes=4)}
    told = {}
    for name, strategy in strategies.items():
        arrays = {"w": Array(np.zeros(3, np.float32)), "steps": Array(np.array(7))}
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=context.run_config["rounds"]
        )
        told[name] = {
            "w": result.arrays["w"].numpy().tolist(),
            # As it is: Flower's mean of integers is a float, 7 but for the order in which replies came.
            "steps": result.arrays["steps"].numpy().item(),
            "train": [dict(each) for each in result.train_metrics_clientapp.values()],
            "evaluate": [dict(each) for each in result.evaluate_metrics_clientapp.values()],
        }
    if path := context.run_config["report.path"]:
        Path(path).write_text(json.dumps(told))
