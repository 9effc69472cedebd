"""A node pulls the model towards its own target: clipped, and in eight bits."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge_client.flower import clip, quantise

app = ClientApp(mods=[quantise(), clip(5.0)])


@app.train()
def train(message: Message, context: Context) -> Message:
    values = message.content["arrays"]["w"].numpy()
    target = np.linspace(0, int(context.node_config["partition-id"]), len(values))
    values += 0.5 * (target - values)
    content = {"arrays": ArrayRecord({"w": Array(values)}), "metrics": MetricRecord({"num-examples": 10})}
    return Message(RecordDict(content), reply_to=message)
