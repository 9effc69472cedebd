"""Federated averaging of two arrays."""

import json
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    initial = ArrayRecord([np.zeros((2, 3), np.float32), np.zeros(3, np.float64)])
    rounds = context.run_config["num-server-rounds"]
    result = FedAvg(min_train_nodes=4, min_available_nodes=4).start(
        grid=grid, initial_arrays=initial, num_rounds=rounds
    )
    if path := context.run_config["report.path"]:
        told = {
            "arrays": [array.tolist() for array in result.arrays.to_numpy_ndarrays()],
            "dtypes": [str(array.dtype) for array in result.arrays.to_numpy_ndarrays()],
            "train": {number: dict(record) for number, record in result.train_metrics_clientapp.items()},
            "evaluate": {
                number: dict(record) for number, record in result.evaluate_metrics_clientapp.items()
            },
        }
        Path(path).write_text(json.dumps(told))
