"""A strategy of the older API, which calls its clients from several threads at once."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


class Reporting(FedAvg):
    path = ""

    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        told = {
            "round": server_round,
            "arrays": [each.tolist() for each in parameters_to_ndarrays(parameters)],
            "fits": sorted(result.metrics["fits"] for _, result in results),
            "rounds": sorted(result.metrics["round"] for _, result in results),
            "failures": len(failures),
        }
        if self.path:
            Path(self.path).write_text(json.dumps(told))
        return parameters, metrics


def server_fn(context: Context):
    strategy = Reporting(
        initial_parameters=ndarrays_to_parameters([np.zeros((2, 2)), np.zeros(3)]),
        on_fit_config_fn=lambda number: {"round": number},
        min_available_clients=4,
    )
    strategy.path = context.run_config["report.path"]
    config = ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
