"""Node 1 does not behave; the others do."""

import os
import signal
import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    count = context.state.config_records.setdefault("turns", ConfigRecord({"count": 0}))
    count["count"] = int(count["count"]) + 1
    how = context.run_config["how"]
    if context.node_config["partition-id"] == 1 and count["count"] == 2:
        if how == "raises":
            raise ValueError("a client that raises")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            sys.exit(3)
        if how == "hangs":
            time.sleep(3600)
        if how == "returns nothing":
            return None
        if how == "waits":
            gate = Path(context.run_config["gate.path"])
            with gate.with_suffix(".began").open("a") as log:
                log.write("x")
            while not gate.exists():
                time.sleep(0.01)
    return Message(RecordDict({"metrics": MetricRecord({"turns": count["count"]})}), reply_to=message)
