"""A node moves towards its own point, as far as it is told to."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    point = np.arange(4) + float(context.node_config["partition-id"])
    w = message.content["arrays"]["w"].numpy()
    w = w + message.content["config"]["step"] * (point - w)
    metrics = MetricRecord({"loss": float(((point - w) ** 2).sum()), "num-examples": 3})
    content = {"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    metrics = MetricRecord(
        {"norm": float(np.linalg.norm(message.content["arrays"]["w"].numpy())), "num-examples": 3}
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
