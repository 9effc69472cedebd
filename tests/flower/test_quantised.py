"""Changes in eight bits: what nodes send with `quantise`, and what a ServerApp makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flower_apps import by_flower, simulated
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge_client.flower import clip, quantise
from fedge_flower import quantised
from fedge_flower.grid import AppGrid
from fedge_flower.internals import be
from fedge_flower.layouts import layout_of, vector_of
from fedge_strategies import FedAvg, MirroredSgd
from fedge_strategies.flower import Dequantised, InFlower

CONTEXT = Context(1, 7, {}, RecordDict(), {})
VECTORS = hnp.arrays(np.float32, 40, elements=st.floats(-1000, 1000, width=32))


class Nodes:
    """A carrier that only says who is there."""

    def node_ids(self) -> list[int]:
        return [1, 2]

    def check(self) -> None:
        pass


def record(values: Any) -> ArrayRecord:
    """Two arrays of one vector, and one that is no floating-point number."""
    flat = np.asarray(values, np.float32)
    arrays = {"w": flat[:30].reshape(5, 6), "b": flat[30:].astype(np.float64), "n": np.array(3)}
    return ArrayRecord({name: Array(each) for name, each in arrays.items()})


def decoded(content: RecordDict, start: Any) -> ArrayRecord:
    layout = layout_of(record(start))
    return quantised.taken(content, vector_of(layout, record(start)), layout, record(start))["arrays"]


def sent(start: Any, **config: str) -> Message:
    be(run_id=3, node_id=1)
    return Message(RecordDict({"arrays": record(start), "config": ConfigRecord(dict(config))}), 7, "train")


def reply(message: Message, returned: Any, *mods: Any) -> Message:
    """What leaves a node."""
    metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": record(returned), "metrics": metrics}), reply_to=message)

    return app(message, CONTEXT)


@given(start=VECTORS, returned=VECTORS)
@settings(max_examples=100, deadline=None)
def test_every_number_arrives_within_a_step_of_its_array(start: np.ndarray, returned: np.ndarray):
    message = sent(start)
    content = reply(message, returned, quantise()).content
    assert {each.dtype for each in content["arrays"].values()} == {"int8"}
    assert "n" not in content["arrays"]
    found = decoded(content, start)
    for name, wanted in record(returned).items():
        change = wanted.numpy() - record(start)[name].numpy()
        step = np.abs(change).max() / 127
        assert np.all(np.abs(found[name].numpy() - wanted.numpy()) <= step * 1.0001 + 5e-4), name
        assert found[name].dtype == wanted.dtype


def test_numbers_are_right_on_average_and_a_quarter_as_long():
    values = np.linspace(-1, 1, 40, dtype=np.float32) ** 3
    messages = [reply(sent(np.zeros(40)), values, quantise()) for _ in range(400)]
    rows = [vector_of(layout_of(record(values)), decoded(each.content, np.zeros(40))) for each in messages]
    # A number is off by at most a step of 1/127: its mean over 400 by a twentieth of that, five times over.
    assert np.abs(np.mean(rows, axis=0) - values).max() < 5 / 127 / 2 / 20
    large = np.zeros(10_000, np.float32)
    message = Message(RecordDict({"arrays": ArrayRecord({"w": Array(large)})}), 7, "train")
    content = RecordDict({"arrays": ArrayRecord({"w": Array(large + 1)})})
    left = quantise()(message, CONTEXT, lambda asked, _: Message(content, reply_to=asked))
    assert left.content["arrays"].count_bytes() < large.nbytes / 4 + 1000


def test_what_is_clipped_first_is_quantised_then():
    content = reply(sent(np.zeros(40)), np.ones(40), quantise(), clip(1.0)).content
    assert np.allclose(decoded(content, np.zeros(40))["w"].numpy(), 1 / np.sqrt(40), rtol=1e-2)
    with pytest.raises(ValueError, match=r"expected arrays \['w', 'b', 'n'\]"):
        reply(sent(np.zeros(40)), np.ones(40), clip(1.0), quantise())


@pytest.mark.parametrize(
    "strategy", [InFlower(FedAvg()), Dequantised(FlowersFedAvg())], ids=["ours", "flowers"]
)
def test_strategies_average_what_nodes_have(strategy: Any):
    found = after_a_round(strategy, np.zeros(40), [quantise()], [np.full(40, 1.0), np.full(40, 3.0)])
    assert np.allclose(found["w"].numpy(), 2.0, atol=0.05)
    assert int(found["n"].numpy()) == 3


def test_gradients_are_quantised_as_they_are():
    strategy = InFlower(MirroredSgd(learning_rate=1.0, momentum=0.0))
    mods = [quantise(), clip(np.sqrt(40))]
    found = after_a_round(strategy, np.full(40, 100.0), mods, [np.ones(40), np.full(40, 5.0)])
    assert np.allclose(found["w"].numpy(), 99.0, atol=1e-3), (
        "two gradients of ones, the second one clipped to that"
    )


def test_a_node_without_quantisation_is_averaged_with_one_that_has_it():
    found = after_a_round(
        Dequantised(FlowersFedAvg()), np.zeros(40), [], [np.full(40, 1.0), np.full(40, 3.0)]
    )
    assert np.allclose(found["w"].numpy(), 2.0)


def after_a_round(strategy: Any, start: Any, mods: list[Any], returned: list[Any]) -> Any:
    be(run_id=3, node_id=1)
    grid = AppGrid(3).over(Nodes())  # type: ignore[arg-type]  # nothing is sent
    messages = list(strategy.configure_train(1, record(start), ConfigRecord(), grid))
    assert len(messages) == 2
    replies = [reply(message, values, *mods) for message, values in zip(messages, returned, strict=True)]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics["loss"] == 1.0
    return arrays


def test_a_strategy_that_does_not_know_it_says_so_and_averages_no_bytes():
    with pytest.raises(Exception, match="exactly one ArrayRecord"):
        after_a_round(FlowersFedAvg(), np.zeros(40), [quantise()], [np.ones(40)] * 2)


def scales(value: Any, **others: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(others.get(name, value))) for name in ("w", "b")})


@pytest.mark.parametrize(
    ("numbers", "beside"),
    [
        (np.int8, scales(np.float32(np.nan))),
        (np.int8, scales(np.float32(np.inf))),
        (np.int8, scales(np.float32(-1))),
        (np.int8, scales(1.0)),
        (np.int8, scales(np.ones(1, np.float32))),
        (np.int8, ArrayRecord({"w": Array(np.array(1, np.float32))})),
        (np.float32, scales(np.float32(1))),
    ],
    ids=["nan", "infinite", "negative", "another type", "another shape", "one too few", "not bytes"],
)
@pytest.mark.parametrize(
    "strategy", [InFlower(FedAvg()), Dequantised(FlowersFedAvg())], ids=["ours", "flowers"]
)
def test_what_cannot_be_decoded_is_left_out(
    strategy: Any, numbers: Any, beside: ArrayRecord, caplog: pytest.LogCaptureFixture
):
    be(run_id=3, node_id=1)
    messages = list(
        strategy.configure_train(1, record(np.zeros(40)), ConfigRecord(), AppGrid(3).over(Nodes()))
    )  # type: ignore[arg-type]
    good = reply(messages[0], np.full(40, 2.0), quantise())
    arrays = ArrayRecord({"w": Array(np.zeros((5, 6), numbers)), "b": Array(np.zeros(10, numbers))})
    metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
    content = {"arrays": arrays, "arrays" + quantised.SCALES_OF: beside, "metrics": metrics}
    bad = Message(RecordDict(content), reply_to=messages[1])
    found, _ = strategy.aggregate_train(1, [good, bad])
    assert np.allclose(found["w"].numpy(), 2.0, atol=0.05)
    assert "reply_left_out" in caplog.text


def test_an_app_with_both_mods_runs_in_flowers_own_simulation_and_in_ours(tmp_path: Any):
    exact = np.zeros(50)
    for _ in range(3):
        changes = [0.5 * (np.linspace(0, partition, 50) - exact) for partition in range(4)]
        exact += np.mean([each * min(1, 5 / max(np.linalg.norm(each), 1e-9)) for each in changes], axis=0)
    for found in (
        simulated("quantised_app", tmp_path, nodes=4),
        by_flower("quantised_app", tmp_path, nodes=4),
    ):
        for name in ("in_flower", "dequantised"):
            assert np.abs(np.array(found[name]) - exact).max() < 0.02
