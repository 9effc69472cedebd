"""fedge's strategies in Flower's ServerApp."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_apps import APPS, assert_alike, by_flower, simulated
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError, RunError
from fedge.strategy import installed_strategies
from fedge_flower.grid import AppGrid
from fedge_flower.internals import be
from fedge_strategies import FedAvg, MirroredSgd, Scaffold, Sgd
from fedge_strategies.flower import InFlower

APP = "fedge_strategies_app"


def test_every_strategy_runs_in_flowers_own_simulation_and_gives_what_it_gives_in_ours(tmp_path: Path):
    found = by_flower(APP, tmp_path, nodes=4)
    assert_alike(simulated(APP, tmp_path, nodes=4), found)
    for key in ("w", "train", "evaluate"):  # it averages integers, too
        assert_alike(found["mean"][key], found["flowers"][key])
    ours = {name: each for name, each in found.items() if name != "flowers"}
    assert all(each["steps"] == 7 for each in ours.values()), "integers stay as they were sent"
    losses = {name: [row["loss"] for row in each["evaluate"]] for name, each in found.items()}
    assert all(each[-1] < each[0] for each in losses.values()), losses
    assert len({str(each["w"]) for each in found.values()}) == len(found) - 1, "they are different algorithms"


def test_no_strategy_is_missing_from_that_app():
    tree = ast.parse((APPS / APP / "oursapp/server_app.py").read_text())
    (names,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "fedge_strategies"
    ]
    used = {each.name.lower() for each in names.names}
    assert {name.replace("_", "") for name in installed_strategies()} == used | {"scaffold"}


class Nodes:
    """A carrier that only says who is there."""

    def __init__(self, count: int) -> None:
        self._count = count

    def node_ids(self) -> list[int]:
        return list(range(1, self._count + 1))

    def check(self) -> None:
        pass


def grid(count: int) -> Grid:
    be(run_id=3, node_id=1)
    return AppGrid(3).over(Nodes(count))  # type: ignore[arg-type]  # nothing is sent


def replies(messages: Sequence[Message], values: Sequence[Any], examples: Sequence[Any]) -> list[Message]:
    found = []
    for message, value, count in zip(messages, values, examples, strict=True):
        if isinstance(value, str):
            found.append(Message(Error(2, value), reply_to=message))
            continue
        metrics = MetricRecord({"loss": 1.0, "num-examples": count})
        content = {"arrays": ArrayRecord({"w": Array(np.asarray(value))}), "metrics": metrics}
        found.append(Message(RecordDict(content), reply_to=message))
    return found


def round_of(strategy: Any, start: Any, values: Sequence[Any], examples: Sequence[Any]) -> Any:
    """The arrays after one round, in which nodes return these."""
    arrays = ArrayRecord({"w": Array(np.asarray(start))})
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid(len(values))))
    made, metrics = strategy.aggregate_train(1, replies(messages, values, examples))
    return None if made is None else made["w"].numpy(), metrics


VECTORS = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)


@given(
    start=VECTORS,
    nodes=st.lists(st.tuples(VECTORS, st.integers(1, 1000)), min_size=2, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_the_mean_is_flowers(start: list[float], nodes: list[tuple[list[float], int]]):
    values = [np.array(each, np.float32) for each, _ in nodes]
    examples = [count for _, count in nodes]
    ours, told = round_of(InFlower(FedAvg()), np.array(start, np.float32), values, examples)
    flowers, expected = round_of(FlowersFedAvg(), np.array(start, np.float32), values, examples)
    assert np.allclose(ours, flowers, rtol=1e-5, atol=1e-4)
    assert dict(told) == pytest.approx(dict(expected))
    assert ours.dtype == np.float32


def test_the_median_does_not_move_with_one_liar():
    values = [[1.0], [1.1], [0.9], [1e9]]
    found, _ = round_of(InFlower(FedAvg(aggregation="median")), [0.0], values, [1] * 4)
    assert 0.9 <= found[0] <= 1.2
    assert found.dtype == np.float64, "as it was sent"


def test_sgd_leaves_out_what_is_too_stale():
    found, _ = round_of(
        InFlower(Sgd(learning_rate=1.0, momentum=0.0, max_staleness=1)), [0.0], [[1.0]] * 4, [1] * 4
    )
    assert found.tolist() == [-2.0]


def test_buffers_become_the_mean_of_what_nodes_return():
    strategy = InFlower(MirroredSgd(learning_rate=1.0, momentum=0.0), buffers=["w"])
    found, _ = round_of(strategy, [10.0], [[1.0], [3.0]], [1, 1])
    assert found.tolist() == [2.0]


@pytest.mark.parametrize(
    ("value", "examples"),
    [
        ("it failed", 1),
        ([1.0, 2.0], 1),
        ([np.nan], 1),
        ([1.0], 0),
        ([1.0], 1.5),
        ([1.0], 1 << 30),
        ([1.0], [1]),
    ],
    ids=["an error", "another shape", "nan", "nothing", "a part", "too many", "a list"],
)
def test_a_reply_that_is_of_no_use_is_left_out(value: Any, examples: Any, caplog: pytest.LogCaptureFixture):
    found, _ = round_of(InFlower(FedAvg()), [0.0], [[2.0], value], [1, examples])
    assert found.tolist() == [2.0]
    assert "reply_left_out" in caplog.text
    nothing, metrics = round_of(InFlower(FedAvg()), [0.0], [value, value], [examples] * 2)
    assert nothing is None
    assert metrics is None


def test_arrays_that_are_not_those_of_the_last_round_begin_anew(caplog: pytest.LogCaptureFixture):
    strategy = InFlower(FedAvg())
    round_of(strategy, [0.0], [[2.0], [2.0]], [1, 1])
    found, _ = round_of(strategy, [5.0], [[6.0], [6.0]], [1, 1])
    assert found.tolist() == [6.0]
    assert "strategy_begins_anew" in caplog.text
    assert strategy.learned is not None
    assert strategy.learned.vector.tolist() == [6.0]


@pytest.mark.filterwarnings("ignore:overflow")
def test_what_cannot_go_on_is_said():
    with pytest.raises(ConfigError, match="arguments of Flower's FedAvg"):
        InFlower(FedAvg(), colour="red")
    with pytest.raises(
        ConfigError, match="Scaffold corrects the gradients of its clients by control variates"
    ):
        InFlower(Scaffold(4))
    with pytest.raises(ConfigError, match="finite numbers"):
        round_of(InFlower(FedAvg()), [np.inf], [[1.0], [1.0]], [1, 1])
    with pytest.raises(ValueError, match="expected configure_train before"):
        InFlower(FedAvg()).aggregate_train(1, [])
    with pytest.raises(RunError, match="made a model with NaN or infinity"):
        round_of(
            InFlower(FedAvg(server_learning_rate=1e10)), np.zeros(1, np.float32), [[3e38], [3e38]], [1, 1]
        )
