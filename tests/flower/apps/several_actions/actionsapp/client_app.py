"""Queries, two ways to train, mods of one function, and all that a record may hold."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod

app = ClientApp()


def doubled(message: Message, context: Context, call_next) -> Message:
    reply = call_next(message, context)
    reply.content["metrics"]["value"] *= 2
    return reply


@app.query()
def query(message: Message, context: Context) -> Message:
    state = context.state.config_records.setdefault("asked", ConfigRecord({"times": 0}))
    state["times"] = int(state["times"]) + 1
    config = ConfigRecord(
        {
            "flag": True,
            "texts": ["a", "b"],
            "bytes": b"\x00\xff",
            "reals": [0.5, 1.5],
            "flags": [True, False],
            "times": state["times"],
            "partition": context.node_config["partition-id"],
        }
    )
    return Message(RecordDict({"config": config, "echo": message.content["question"]}), reply_to=message)


@app.train("fast", mods=[doubled, arrays_size_mod])
def fast(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"value": 1.5, "list": [1, 2, 3]})}), reply_to=message)


@app.train("exact")
def exact(message: Message, context: Context) -> Message:
    """An array in a type that numpy does not have, as the app itself has serialised it."""
    sent = message.content["arrays"]["brain"]
    assert (sent.dtype, sent.shape, sent.stype) == ("bfloat16", (2,), "raw"), sent
    return Message(
        RecordDict({"arrays": ArrayRecord({"brain": Array("bfloat16", (2,), "raw", sent.data[::-1])})}),
        reply_to=message,
    )
