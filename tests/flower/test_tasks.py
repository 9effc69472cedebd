"""What a ClientApp in a native run may return, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge.errors import LayoutError, RefusedError, TaskError
from fedge.events import OrderId
from fedge.run import Work
from fedge.task import Site
from fedge_client.flower import task_from
from fedge_client.flower.task import FlowerLocal

INITIAL = ArrayRecord({"w": Array(np.zeros(2, np.float32)), "n": Array(np.array(7))})
MODEL = np.array([1.0, 2.0], np.float32)
Returns = Callable[[Message, Context], RecordDict]


def local(returns: Returns, *, config: dict[str, Any] | None = None) -> FlowerLocal:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(returns(message, context), reply_to=message)

    made = task_from(app, INITIAL).local(
        Site("a", config or {}), Work(epochs=2, batch_size=8, learning_rate=0.5, proximal=0.1)
    )
    assert isinstance(made, FlowerLocal)
    return made


def done(site: FlowerLocal, kind: Any = "train", *, private: Any = None) -> tuple[Any, list[float]]:
    out = np.full(2, np.nan, np.float32)
    found = site.do(
        OrderId(kind, 3), seed=1, model=MODEL, out=out, private=private, progress=lambda done, total: None
    )
    return found, out.tolist()


def content(w: Any, **metrics: Any) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"w": Array(np.asarray(w))}), "metrics": MetricRecord(metrics)})


def test_it_is_asked_as_flower_asks_and_what_it_returns_is_a_change_of_the_model():
    seen: dict[str, Any] = {}

    def returns(message: Message, context: Context) -> RecordDict:
        seen.update(
            w=message.content["arrays"]["w"].numpy().tolist(),
            n=int(message.content["arrays"]["n"].numpy()),
            config=dict(message.content["config"]),
            node=dict(context.node_config),
        )
        return content(
            [1.5, 1.0], **{"num-examples": 9, "train_loss": 0.25, "list": [1.0], "odd": float("nan")}
        )

    found, out = done(local(returns, config={"partition-id": 4, "files": ["a"]}))
    assert seen == {
        "w": [1.0, 2.0],
        "n": 7,
        "config": {
            "server-round": 3,
            "fedge-work": "train",
            "lr": 0.5,
            "batch-size": 8,
            "local-epochs": 2,
            "proximal-mu": 0.1,
        },
        "node": {"partition-id": 4},
    }
    assert out == [0.5, -1.0]
    assert (found.num_examples, dict(found.metrics), found.mechanism) == (9, {"train_loss": 0.25}, None)


def test_a_gradient_is_what_it_returns():
    _, out = done(local(lambda message, context: content([1.5, 1.0], **{"num-examples": 9})), "gradient")
    assert out == [1.5, 1.0]


@pytest.mark.parametrize(
    ("returned", "kind", "says"),
    [
        (content([1.0, 2.0]), TaskError, "a whole number of 'num-examples', found None"),
        (content([1.0, 2.0], **{"num-examples": 0.5}), TaskError, "found 0.5"),
        (content([1.0, 2.0, 3.0], **{"num-examples": 1}), LayoutError, "expected shape"),
        (RecordDict({"metrics": MetricRecord({"num-examples": 1})}), TaskError, "an array 'w', found none"),
        (RecordDict(), TaskError, "an array 'w', found none"),
    ],
    ids=["no weight", "half a weight", "another shape", "no arrays", "nothing"],
)
def test_what_is_no_update_is_the_tasks_failure(returned: RecordDict, kind: type[Exception], says: str):
    with pytest.raises(kind, match=says):
        done(local(lambda message, context: returned))


def test_a_client_app_that_fails_is_the_tasks_failure_and_its_state_stays():
    def returns(message: Message, context: Context) -> RecordDict:
        turns = context.state.metric_records.setdefault("turns", MetricRecord({"n": 0}))
        turns["n"] = int(turns["n"]) + 1
        if turns["n"] == 2:
            raise ValueError("not again")
        return content([1.0, 2.0], **{"num-examples": 1, "turns": turns["n"]})

    site = local(returns)
    assert done(site)[0].metrics["turns"] == 1
    for _ in range(2):
        with pytest.raises(TaskError, match="the ClientApp failed: ValueError: not again"):
            done(site)


def test_examples_cannot_be_protected_and_are_not_said_to_be():
    with pytest.raises(RefusedError, match="cannot be protected"):
        done(local(lambda message, context: content([0.0, 0.0])), private=object())


def test_a_run_begins_with_the_arrays_that_were_given():
    app = ClientApp()
    for initial in (INITIAL, lambda: INITIAL):
        model = task_from(app, initial, buffers=["w"]).initial(3)
        assert (model.vector.tolist(), model.layout.trainable_size) == ([0.0, 0.0], 0)
