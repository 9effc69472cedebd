"""A node takes a step towards its own target, and clips it where a strategy asks for that."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod

KEY = "clipping_norm"


def clip_where_asked(message: Message, context: Context, call_next: object) -> Message:
    asked = any(KEY in config for config in message.content.config_records.values())
    return fixedclipping_mod(message, context, call_next) if asked else call_next(message, context)


app = ClientApp(mods=[clip_where_asked])


@app.train()
def train(message: Message, context: Context) -> Message:
    w = message.content["arrays"]["w"].numpy()
    partition = int(context.node_config["partition-id"])
    target = float(partition**2)  # no two pairs of nodes are equally far apart
    loss = float(np.square(w - target).mean())
    w += 0.25 * (target - w)
    arrays = ArrayRecord({"w": Array(w)})
    metrics = MetricRecord({"train_loss": loss, "num-examples": 10 + partition})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
