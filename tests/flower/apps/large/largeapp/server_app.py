"""A large array to everybody, and the mean of what they make of it."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    model, seconds = np.arange(context.run_config["elements"], dtype=np.float32), []
    for _ in range(context.run_config["rounds"]):
        began = time.monotonic()
        content = RecordDict({"arrays": ArrayRecord({"x": Array(model)})})
        replies = list(
            grid.send_and_receive([Message(content, each, "train") for each in grid.get_node_ids()])
        )
        model = sum(each.content["arrays"]["x"].numpy() for each in replies) / len(replies)
        seconds.append(time.monotonic() - began)
    if path := context.run_config["report.path"]:
        told = {"first": model[:3].tolist(), "last": model[-3:].tolist(), "replies": len(replies)}
        Path(path).write_text(json.dumps({**told, "seconds": seconds}))
