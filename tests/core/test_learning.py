"""What a run has learned: folds by kind of order, one step at a close, and nothing that is not finite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import RunError
from fedge.events import OrderId
from fedge.learning import Learning
from fedge.pipeline import Update
from fedge.strategy import AnyStrategy
from fedge.vector import Array, Layout, Model, Tensor
from fedge_strategies import FedAvg, MirroredSgd, Sgd

LAYOUT = Layout((Tensor("w", (3,)), Tensor("mean", (1,), role="buffer")))
TRAIN, EVALUATE = OrderId("train", 1), OrderId("evaluate", 1)


def begin(strategy: AnyStrategy | None = None) -> Learning:
    return Learning.begin(strategy or FedAvg(), Model(np.ones(4, np.float32), LAYOUT))


def update(client: str, *values: float, examples: int = 10, **metrics: float) -> Update:
    vector: Array = np.array(values, np.float32)
    return Update(client, vector, examples, metrics)


def test_a_close_makes_the_strategys_step_on_the_mean_of_what_was_folded():
    learning = begin()
    for client, value, examples in (("b", 1.0, 30), ("a", 5.0, 10)):
        learning = learning.fold(TRAIN, update(client, *[value] * 4, examples=examples, train_loss=value))
    np.testing.assert_array_equal(learning.model.vector, np.ones(4))
    learning, aggregate = learning.close(TRAIN)
    np.testing.assert_array_equal(learning.model.vector, np.full(4, 3.0))
    assert (aggregate.clients, aggregate.num_examples) == (("a", "b"), 40)
    assert aggregate.metrics == {"train_loss": 2.0}
    assert dict(learning.folds) == {}


def test_an_evaluation_has_no_vector_and_moves_nothing():
    learning = (
        begin().fold(EVALUATE, update("a", loss=1.0)).fold(EVALUATE, update("b", loss=2.0, examples=30))
    )
    state = learning.state
    learning, aggregate = learning.close(EVALUATE)
    assert learning.state is state
    assert aggregate.metrics == {"loss": 1.75}
    assert len(aggregate.vector) == 0


def test_training_and_evaluation_are_folded_apart_and_given_up_apart():
    learning = begin().fold(TRAIN, update("a", *[2.0] * 4)).fold(EVALUATE, update("a", loss=1.0))
    without = learning.abandon(EVALUATE)
    assert set(without.folds) == {"train"}
    without, _ = without.close(TRAIN)
    np.testing.assert_array_equal(without.model.vector, np.full(4, 3.0))
    assert set(learning.folds) == {"train", "evaluate"}, "the value before is as it was"
    assert begin().abandon(TRAIN).folds == {}


def test_what_was_given_up_is_not_part_of_the_next_attempt():
    learning = begin().fold(TRAIN, update("a", *[100.0] * 4)).abandon(TRAIN)
    again = OrderId("train", 1, 2)
    learning, aggregate = learning.fold(again, update("b", *[1.0] * 4)).close(again)
    np.testing.assert_array_equal(learning.model.vector, np.full(4, 2.0))
    assert aggregate.clients == ("b",)


@pytest.mark.parametrize("strategy", [FedAvg(1e38), MirroredSgd(learning_rate=1e38), Sgd(learning_rate=1e38)])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_model_that_is_not_finite_ends_the_run_and_the_last_good_one_stays(strategy: AnyStrategy):
    learning = begin(strategy)
    order = OrderId(learning.order(1).kind, 4)
    learning = learning.fold(order, update("a", *[1e10] * 4))
    with pytest.raises(RunError, match="round 4 made a model with NaN or infinity: lower the learning rate"):
        learning.close(order)
    np.testing.assert_array_equal(learning.model.vector, np.ones(4))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.sampled_from([1.0, 0.3, -1e20, 1e20, 3e-17])),
        min_size=4,
        max_size=6,
    ),
    st.randoms(),
)
def test_the_order_of_arrival_changes_no_bit_of_the_model(sent, random):
    def model(updates: list[tuple[int, float]]) -> bytes:
        learning = begin()
        for number, (examples, value) in enumerate(updates):
            learning = learning.fold(TRAIN, update(str(number), *[value] * 4, examples=examples))
        return learning.close(TRAIN)[0].model.vector.tobytes()

    shuffled = list(sent)
    random.shuffle(shuffled)
    assert model(sent) == model(shuffled)


def test_a_step_gets_the_aggregates_vector_for_itself():
    """It may reuse the memory, so nobody else is given it."""
    learning, aggregate = begin().fold(TRAIN, update("a", *[1.0] * 4)).close(TRAIN)
    assert len(aggregate.vector) == 0
    assert not np.shares_memory(learning.model.vector, aggregate.vector)
