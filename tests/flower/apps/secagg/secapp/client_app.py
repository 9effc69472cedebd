"""A client of the legacy API whose updates are masked by Flower's SecAgg+."""

import numpy as np
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp


class Pulls(NumPyClient):
    def __init__(self, target: float) -> None:
        self.target = target

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, object]
    ) -> tuple[list[np.ndarray], int, dict]:
        return [each + 0.5 * (self.target - each) for each in parameters], 10, {}


def client_fn(context: Context) -> Client:
    return Pulls(float(context.node_config["partition-id"])).to_client()


app = ClientApp(client_fn=client_fn, mods=[secaggplus_mod])
