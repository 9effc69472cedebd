"""Flower's own strategies, one after the other, each from the same arrays."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
)

app = ServerApp()
NODES = {"min_train_nodes": 4, "min_available_nodes": 4, "fraction_evaluate": 0.0}
HARDLY = 1e-9  # noise that does not show


@app.main()
def main(grid: Grid, context: Context) -> None:
    plain = (Bulyan, FedAdagrad, FedAdam, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, Krum, MultiKrum)
    strategies = {each.__name__: each(**NODES) for each in plain} | {
        "FedProx": FedProx(proximal_mu=0.1, **NODES),
        "QFedAvg": QFedAvg(client_learning_rate=0.1, **NODES),
        "DPServerSide": DifferentialPrivacyServerSideFixedClipping(FedAvg(**NODES), HARDLY, 0.5, 4),
        "DPClientSide": DifferentialPrivacyClientSideFixedClipping(FedAvg(**NODES), HARDLY, 0.5, 4),
    }
    told = {}
    for name, strategy in strategies.items():
        arrays = ArrayRecord({"w": Array(np.linspace(0, 1, 5, dtype=np.float32))})
        result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=2)
        told[name] = result.arrays["w"].numpy().tolist()
    if path := context.run_config["report.path"]:
        Path(path).write_text(json.dumps(told))
