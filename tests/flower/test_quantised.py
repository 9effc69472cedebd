"""Changes in eight bits: what nodes send with `quantise`, and what a ServerApp makes of it."""

from __future__ import annotations

import random
from collections.abc import Callable
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
from fedge_flower.asked import Asked
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
    """Three arrays of one vector, one of them without a dimension, and one that is no floating-point number."""
    flat = np.asarray(values, np.float32)
    one = flat[39:].reshape(())
    arrays = {"w": flat[:30].reshape(5, 6), "b": flat[30:39].astype(np.float64), "one": one, "n": np.array(3)}
    return ArrayRecord({name: Array(each) for name, each in arrays.items()})


def decoded(content: RecordDict, start: Any) -> ArrayRecord:
    return quantised.taken(content, Asked("train", {"arrays": record(start)}))["arrays"]


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
    with pytest.raises(ValueError, match=r"expected arrays \['w', 'b', 'one', 'n'\]"):
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


def scales(value: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name in ("w", "b", "one")})


def numbers(dtype: Any) -> ArrayRecord:
    shapes = {"w": (5, 6), "b": 9, "one": ()}
    return ArrayRecord({name: Array(np.zeros(shape, dtype)) for name, shape in shapes.items()})


def lies() -> ArrayRecord:
    """Said to be int8, and are not."""
    found = numbers(np.int8)
    found["w"] = Array("int8", (5, 6), "numpy.ndarray", Array(np.full((5, 6), np.nan, np.float32)).data)
    return found


def cut_off() -> ArrayRecord:
    found = numbers(np.int8)
    found["w"] = Array("int8", (5, 6), "numpy.ndarray", b"")
    return found


@pytest.mark.parametrize(
    ("arrays", "beside"),
    [
        (numbers(np.int8), scales(np.float32(np.nan))),
        (numbers(np.int8), scales(np.float32(np.inf))),
        (numbers(np.int8), scales(np.float32(-1))),
        (numbers(np.int8), scales(1.0)),
        (numbers(np.int8), scales(np.ones(1, np.float32))),
        (numbers(np.int8), ArrayRecord({"w": Array(np.array(1, np.float32))})),
        (numbers(np.float32), scales(np.float32(1))),
        (lies(), scales(np.float32(1))),
        (cut_off(), scales(np.float32(1))),
        (ArrayRecord({"w": Array(np.full((5, 6), 127, np.int8))}), scales(np.float32(1))),
        (numbers(np.int8), MetricRecord({"w": 1.0})),
    ],
    ids=[
        *(
            "nan",
            "infinite",
            "negative",
            "another type",
            "another shape",
            "one too few",
            "not bytes",
            "a lie",
        ),
        *("cut off", "an array is missing", "metrics for scales"),
    ],
)
@pytest.mark.parametrize(
    "strategy", [InFlower(FedAvg()), Dequantised(FlowersFedAvg())], ids=["ours", "flowers"]
)
def test_what_cannot_be_decoded_is_left_out(
    strategy: Any, arrays: ArrayRecord, beside: Any, caplog: pytest.LogCaptureFixture
):
    be(run_id=3, node_id=1)
    messages = list(
        strategy.configure_train(1, record(np.zeros(40)), ConfigRecord(), AppGrid(3).over(Nodes()))
    )  # type: ignore[arg-type]
    good = reply(messages[0], np.full(40, 2.0), quantise())
    metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
    content = {"arrays": arrays, "arrays" + quantised.SCALES_OF: beside, "metrics": metrics}
    bad = Message(RecordDict(content), reply_to=messages[1])
    if isinstance(beside, MetricRecord) and isinstance(strategy, Dequantised):
        with pytest.raises(Exception, match="same keys"):
            strategy.aggregate_train(1, [good, bad])
        return
    found, _ = strategy.aggregate_train(1, [good, bad])
    assert np.allclose(found["w"].numpy(), 2.0, atol=0.05)
    assert "reply_left_out" in caplog.text


class Sends(FlowersFedAvg):
    """Flower's, but each node is sent what this makes of the arrays and the settings."""

    def __init__(self, change: Callable[[ArrayRecord, ConfigRecord], ArrayRecord]) -> None:
        super().__init__()
        self.change = change

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        return super().configure_train(server_round, self.change(arrays, config), config, grid)


def halved(arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
    return record([each / 2 for each in [10.0] * 40])


def of_gradients(arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
    config["fedge-work"] = "gradient"
    return arrays


@pytest.mark.parametrize(
    ("change", "returned"), [(halved, 7.0), (of_gradients, 1.0)], ids=["arrays", "gradients"]
)
def test_a_change_is_added_to_what_the_node_was_sent(change: Any, returned: float):
    plain = after_a_round(Sends(change), np.full(40, 10.0), [], [np.full(40, returned)] * 2)
    found = after_a_round(
        Dequantised(Sends(change)), np.full(40, 10.0), [quantise()], [np.full(40, returned)] * 2
    )
    assert np.allclose(plain["w"].numpy(), returned)
    assert np.allclose(found["w"].numpy(), returned, atol=0.05)


@pytest.mark.parametrize("mods", [[], [quantise()], [clip(1e6)]], ids=["none", "quantise", "clip"])
def test_buffers_are_what_nodes_return_under_gradients_too(mods: list[Any]):
    strategy = InFlower(MirroredSgd(learning_rate=1.0, momentum=0.0), buffers=["w"])
    found = after_a_round(strategy, np.full(40, 5.0), mods, [np.full(40, 7.0)] * 2)
    assert np.allclose(found["w"].numpy(), 7.0, atol=0.05)
    assert np.allclose(found["b"].numpy(), -2.0, atol=0.1)


def test_apps_that_begin_their_generators_anew_do_not_round_alike():
    returned = np.linspace(0, 1, 40)
    seen = set()
    for node in range(20):
        random.seed(42)
        context = Context(1, node, {}, RecordDict(), {})
        message = sent(np.zeros(40))
        content = RecordDict({"arrays": record(returned), "metrics": MetricRecord({"num-examples": 1})})
        left = quantise()(message, context, lambda asked, _, its=content: Message(its, reply_to=asked))
        seen.add(left.content["arrays"]["w"].numpy().tobytes())
    assert len(seen) == 20


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
