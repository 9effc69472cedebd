"""Mods that bound what a ClientApp returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.records import AppMessage, ErrorCode
from fedge_client.flower import clip
from fedge_flower.internals import be
from fedge_flower.node import Node, answered
from fedge_flower.records import plain_of

CONTEXT = Context(1, 7, {}, RecordDict(), {})
VALUES = st.lists(st.floats(-1000, 1000, width=32), min_size=4, max_size=4)


def record(w: Any, b: Any = 0.0, steps: int = 3) -> ArrayRecord:
    return ArrayRecord(
        {
            "w": Array(np.asarray(w, np.float32)),
            "b": Array(np.asarray(b, np.float64)),
            "steps": Array(np.array(steps)),
        }
    )


def through(max_norm: float, sent: ArrayRecord, returned: Any) -> Message:
    """What leaves a node whose ClientApp returns this."""
    be(run_id=3, node_id=1)
    message = Message(RecordDict({"arrays": sent}), 7, "train")
    if isinstance(returned, Error):
        return clip(max_norm)(message, CONTEXT, lambda asked, _: Message(returned, reply_to=asked))
    content = RecordDict({"arrays": returned, "metrics": MetricRecord({"num-examples": 1})})
    return clip(max_norm)(message, CONTEXT, lambda asked, _: Message(content, reply_to=asked))


@given(sent=VALUES, returned=VALUES, bias=st.floats(-100, 100), norm=st.floats(0.01, 100))
@settings(max_examples=100, deadline=None)
def test_no_change_is_longer_than_it_may_be_and_its_direction_stays(
    sent: list[float], returned: list[float], bias: float, norm: float
):
    before, after = record(sent), record(returned, bias)
    found = through(norm, before, after).content["arrays"]
    change = np.append(found["w"].numpy().astype(np.float64) - np.float32(sent), found["b"].numpy())
    wanted = np.append(np.float32(returned).astype(np.float64) - np.float32(sent), bias)
    length = np.linalg.norm(wanted)
    scale = min(1.0, norm / length) if length else 1.0
    slack = 1e-3  # float32 of numbers up to a thousand
    assert np.linalg.norm(change) <= norm + slack
    assert np.allclose(change, scale * wanted, atol=slack)
    assert (found["w"].dtype, found["b"].dtype) == ("float32", "float64")


def test_what_is_no_floating_point_number_goes_back_as_it_was_sent():
    found = through(1.0, record([1.0], steps=3), record([1.5], steps=10**9)).content["arrays"]
    assert int(found["steps"].numpy()) == 3


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (record([np.nan]), "NaN or infinity"),
        (record([1.0, 2.0]), "expected shape"),
        (ArrayRecord({"w": Array(np.zeros(1, np.float32)), "more": Array(np.zeros(9))}), "expected arrays"),
    ],
    ids=["nan", "another shape", "other arrays"],
)
def test_what_cannot_be_bounded_does_not_leave(returned: ArrayRecord, says: str):
    with pytest.raises(Exception, match=says):
        through(1.0, record([0.0]), returned)
    app = ClientApp(mods=[clip(1.0)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": returned}), reply_to=message)

    asked: AppMessage = plain_of(Message(RecordDict({"arrays": record([0.0])}), 7, "train"))
    made = answered(app, Node(7, {}), asked, run_id=3, run_config={}, state={}).message
    assert made.content.code in (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.UNKNOWN)  # type: ignore[union-attr]


def test_replies_without_arrays_and_errors_pass():
    assert through(1.0, record([0.0]), Error(2, "why")).error.reason == "why"
    message = Message(RecordDict({"arrays": record([0.0])}), 7, "evaluate")
    metrics = RecordDict({"metrics": MetricRecord({"loss": 1.0})})
    passed = clip(1.0)(message, CONTEXT, lambda asked, _: Message(metrics, reply_to=asked))
    assert passed.content["metrics"]["loss"] == 1.0


def test_a_bound_is_above_zero():
    with pytest.raises(ValueError, match="max_norm above 0"):
        clip(0.0)
