"""A node fits a line through its own points: by a few steps, or by the gradient of one."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def points(context: Context) -> tuple[np.ndarray, np.ndarray]:
    partition = int(context.node_config["partition-id"])
    x = np.random.default_rng(partition).normal(size=(20 + 5 * partition, 3))
    return x, x @ np.array([1.0, -2.0, 0.5]) + 0.1 * partition


def gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.T @ (x @ w - y) / len(y)


@app.train()
def train(message: Message, context: Context) -> Message:
    x, y = points(context)
    w = message.content["arrays"]["w"].numpy().astype(np.float64)
    if message.content["config"].get("fedge-work") == "gradient":
        w = gradient(w, x, y)
    else:
        for _ in range(3):
            w -= 0.1 * gradient(w, x, y)
    arrays = ArrayRecord({"w": Array(w.astype(np.float32)), "steps": message.content["arrays"]["steps"]})
    metrics = MetricRecord({"loss": float(np.mean((x @ w - y) ** 2)), "num-examples": len(y)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    x, y = points(context)
    w = message.content["arrays"]["w"].numpy()
    metrics = MetricRecord({"loss": float(np.mean((x @ w - y) ** 2)), "num-examples": len(y)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
