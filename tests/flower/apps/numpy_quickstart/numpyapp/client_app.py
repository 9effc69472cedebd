"""A node pulls the model towards its own target, and says how far it is."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def target(context: Context) -> np.ndarray:
    return np.full((2, 3), float(context.node_config["partition-id"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    weights, bias = message.content["arrays"].to_numpy_ndarrays()
    step = context.run_config["step"]
    weights += step * (target(context) - weights)
    bias += step
    metrics = {
        "num-examples": 10 + 5 * int(context.node_config["partition-id"]),
        "train_loss": float(weights.mean()),
    }
    content = RecordDict({"arrays": ArrayRecord([weights, bias]), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    weights, _ = message.content["arrays"].to_numpy_ndarrays()
    loss = float(np.square(weights - target(context)).mean())
    metrics = MetricRecord({"num-examples": 7, "eval_loss": loss})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
