"""Adds its partition's number and one."""

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    model = message.content["arrays"]["x"].numpy() + (context.node_config["partition-id"] + 1)
    return Message(RecordDict({"arrays": ArrayRecord({"x": Array(model)})}), reply_to=message)
