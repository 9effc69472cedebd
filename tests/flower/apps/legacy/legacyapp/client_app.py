"""A NumPyClient, with a mod around it and a counter in its context."""

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp


class Client(NumPyClient):
    def __init__(self, context: Context) -> None:
        self.context = context
        self.partition = int(context.node_config["partition-id"])

    def fit(self, parameters, config):
        counter = self.context.state.config_records.setdefault("fits", ConfigRecord({"count": 0}))
        counter["count"] = int(counter["count"]) + 1
        moved = [each + self.partition for each in parameters]
        return moved, 10 * (self.partition + 1), {"fits": counter["count"], "round": config["round"]}

    def evaluate(self, parameters, config):
        return float(np.abs(parameters[0]).sum()), 5, {"partition": self.partition}


def client_fn(context: Context):
    return Client(context).to_client()


def seen(message: Message, context: Context, call_next) -> Message:
    """A mod: it counts what goes through it."""
    record = context.state.config_records.setdefault("seen", ConfigRecord({"messages": 0}))
    record["messages"] = int(record["messages"]) + 1
    return call_next(message, context)


app = ClientApp(client_fn=client_fn, mods=[seen])
