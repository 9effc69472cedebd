"""Federated averaging, with the learning rate in the round's settings."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from torchapp.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(3)
    result = FedAvg(min_train_nodes=4, min_available_nodes=4).start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    if path := context.run_config["report.path"]:
        told = {
            "arrays": {name: value.tolist() for name, value in result.arrays.to_torch_state_dict().items()},
            "evaluate": {
                number: dict(record) for number, record in result.evaluate_metrics_clientapp.items()
            },
        }
        Path(path).write_text(json.dumps(told))
