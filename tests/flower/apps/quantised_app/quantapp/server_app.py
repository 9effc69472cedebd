"""Three rounds of federated averaging, by a strategy of Flower's and one of fedge's."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedge_strategies import FedAvg as FedgesFedAvg
from fedge_strategies.flower import Dequantised, InFlower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    nodes = {"min_train_nodes": 4, "min_available_nodes": 4, "fraction_evaluate": 0.0}
    strategies = {
        "dequantised": Dequantised(FedAvg(**nodes)),
        "in_flower": InFlower(FedgesFedAvg(), **nodes),
    }
    told = {}
    for name, strategy in strategies.items():
        arrays = ArrayRecord({"w": Array(np.zeros(50, np.float32))})
        result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=3)
        told[name] = result.arrays["w"].numpy().tolist()
    if path := context.run_config["report.path"]:
        Path(path).write_text(json.dumps(told))
