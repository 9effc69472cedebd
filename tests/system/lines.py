"""A Flower client that fits a line, as a task: copied to sites, and to whoever submits."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge_client.flower import task_from

client_app = ClientApp()
TRUE = np.array([1.0, -2.0, 0.5])


def points(partition: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(partition).normal(size=(20 + 5 * partition, 3))
    return x, x @ TRUE + 0.1 * partition


def gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.T @ (x @ w - y) / len(y)


def loss(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((x @ w - y) ** 2))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    x, y = points(int(context.node_config["partition-id"]))
    config, w = message.content["config"], message.content["arrays"]["w"].numpy().astype(np.float64)
    turns = context.state.config_records.setdefault("turns", ConfigRecord({"count": 0}))
    turns["count"] = int(turns["count"]) + 1
    metrics = MetricRecord({"train_loss": loss(w, x, y), "num-examples": len(y), "turns": turns["count"]})
    if config["fedge-work"] == "gradient":
        w = gradient(w, x, y)
    else:
        for _ in range(config["local-steps"]):
            w -= config["lr"] * gradient(w, x, y)
    if context.node_config.get("broken"):
        raise ValueError("patient 4711 has no age")
    arrays = {"w": Array(w.astype(np.float32)), "steps": message.content["arrays"]["steps"]}
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    x, y = points(int(context.node_config["partition-id"]))
    metrics = MetricRecord(
        {"loss": loss(message.content["arrays"]["w"].numpy(), x, y), "num-examples": len(y)}
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


task = task_from(client_app, ArrayRecord({"w": Array(np.zeros(3, np.float32)), "steps": Array(np.array(7))}))
