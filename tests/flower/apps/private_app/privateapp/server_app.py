"""What nodes return for the same message, twice, byte by byte; then rounds until their budgets are spent."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedge_strategies import FedAvg
from fedge_strategies.flower import InFlower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = InFlower(FedAvg(), min_train_nodes=4, min_available_nodes=4, fraction_evaluate=0.0)
    rounds: list[object] = []
    arrays = ArrayRecord({"weight": Array(np.zeros((1, 3), np.float32))})
    for number in range(1, 11):
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        replies = list(grid.send_and_receive(messages, timeout=120))
        rounds.append([told(reply) for reply in replies])
        made, _ = strategy.aggregate_train(number, replies)
        arrays = made or arrays
    if path := context.run_config["report.path"]:
        Path(path).write_text(json.dumps({"rounds": rounds, "weight": arrays["weight"].numpy().tolist()}))


def told(reply: Message) -> object:
    if reply.has_error():
        return reply.error.reason
    content: RecordDict = reply.content
    return {
        "records": sorted(content),
        "metrics": dict(content["metrics"]),
        "weight": content["arrays"]["weight"].numpy().ravel().tolist(),
    }
