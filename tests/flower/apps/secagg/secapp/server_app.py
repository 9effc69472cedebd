"""Three rounds of federated averaging by Flower's SecAgg+ workflow."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import Grid, LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=4,
        min_available_clients=4,
        initial_parameters=ndarrays_to_parameters([np.zeros(3, np.float32)]),
    )
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=3), strategy=strategy)
    masked = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, clipping_range=8.0)
    DefaultWorkflow(fit_workflow=masked)(grid, legacy)
    (found,) = legacy.state.array_records["parameters"].to_numpy_ndarrays()
    if path := context.run_config["report.path"]:
        Path(path).write_text(json.dumps(found.tolist()))
