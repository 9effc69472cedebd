"""Federated averaging of a model of scikit-learn."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from skapp.task import get_arrays, new_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(min_train_nodes=4, min_available_nodes=4).start(
        grid=grid,
        initial_arrays=ArrayRecord(get_arrays(new_model())),
        num_rounds=context.run_config["num-server-rounds"],
    )
    if path := context.run_config["report.path"]:
        told = {
            "arrays": [each.tolist() for each in result.arrays.to_numpy_ndarrays()],
            "evaluate": [dict(each) for each in result.evaluate_metrics_clientapp.values()],
        }
        Path(path).write_text(json.dumps(told))
