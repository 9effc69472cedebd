"""Two strategies of one's own: FedAvg with other settings each round, and one from scratch that keeps the best node."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

app = ServerApp()


class Decaying(FedAvg):
    """Halves the step of the nodes from round to round."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["step"] = 0.5**server_round
        return super().configure_train(server_round, arrays, config, grid)


class Best(Strategy):
    """The arrays of the node whose loss is least."""

    def __init__(self) -> None:
        self.nodes: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"step": 0.5})})
        self.nodes = sorted(grid.get_node_ids())
        return [
            Message(
                content=content, message_type=MessageType.TRAIN, dst_node_id=node, group_id=str(server_round)
            )
            for node in self.nodes
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found = [each for each in replies if each.has_content()]
        best = min(found, key=lambda each: each.content["metrics"]["loss"])
        return best.content["arrays"], MetricRecord(
            {"loss": best.content["metrics"]["loss"], "of": len(found)}
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        pass


@app.main()
def main(grid: Grid, context: Context) -> None:
    told = {}
    for name, strategy in {
        "decaying": Decaying(min_train_nodes=4, min_available_nodes=4),
        "best": Best(),
    }.items():
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({"w": Array(np.zeros(4))}),
            num_rounds=context.run_config["num-server-rounds"],
            evaluate_fn=lambda number, arrays: MetricRecord(
                {"norm": float(np.linalg.norm(arrays["w"].numpy()))}
            ),
        )
        told[name] = {
            "w": result.arrays["w"].numpy().tolist(),
            "train": [dict(each) for each in result.train_metrics_clientapp.values()],
            "server": [dict(each) for each in result.evaluate_metrics_serverapp.values()],
        }
    if path := context.run_config["report.path"]:
        Path(path).write_text(json.dumps(told))
