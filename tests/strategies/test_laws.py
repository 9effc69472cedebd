"""The laws of the algorithms, against each other and against plain SGD; and what every strategy keeps to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.mirror import advance
from fedge.optimizer import Kind, Optimizer, apply, init_slots
from fedge.pipeline import Aggregate, Mean, Pipeline, Update
from fedge.strategy import AnyStrategy, Order, State, Strategy
from fedge.vector import Array, Layout, Model, Tensor
from fedge_strategies import FedAvg, MirroredSgd, Scaffold, Sgd

# One row per strategy that ships; a new one is a new row.
STRATEGIES: dict[str, AnyStrategy] = {
    "fedavg": FedAvg(),
    "fedavg, slow and uniform": FedAvg(0.5, "uniform"),
    "mirrored sgd": MirroredSgd(),
    "mirrored momentum": MirroredSgd("momentum", 0.1),
    "mirrored adam": MirroredSgd("adam", 0.01, weighting="uniform"),
    "scaffold": Scaffold(8),
    "scaffold, slow and uniform": Scaffold(3, 0.5, "uniform", steps=4, learning_rate=0.1),
    "sgd": Sgd(),
    "sgd with momentum": Sgd("momentum", 0.1, max_staleness=0),
    "sgd with adam": Sgd("adam", 0.01, max_staleness=3),
}
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
each_kind = pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])


# A least-squares problem that several sites hold equal parts of.

FEATURES = 6
LAYOUT = Layout(
    (
        Tensor("weight", (FEATURES - 1,)),
        Tensor("bias", ()),
        Tensor("frozen", (2,), role="frozen"),
        Tensor("mean", (3,), role="buffer"),
    )
)
SIZE, TRAINABLE = LAYOUT.size, LAYOUT.trainable_size


@dataclass(frozen=True, eq=False)
class Data:
    """What a site holds: float64[n, FEATURES] and float64[n]."""

    inputs: Any
    targets: Any

    def gradient(self, theta: Array) -> Array:
        """Of half the mean squared error, at the head of the model; zero in the tail. In float64."""
        residual = self.inputs @ theta[:TRAINABLE].astype(np.float64) - self.targets
        out = np.zeros(SIZE)
        out[:TRAINABLE] = self.inputs.T @ residual / len(self.targets)
        return out.astype(np.float32)


def sites(count: int, examples: int = 20, seed: int = 0) -> list[Data]:
    random = np.random.default_rng(seed)
    truth = random.normal(size=FEATURES)
    out = []
    for _ in range(count):
        inputs = random.normal(size=(examples, FEATURES)) + random.normal(size=FEATURES)
        out.append(Data(inputs, inputs @ truth + 0.1 * random.normal(size=examples)))
    return out


def pooled(parts: Sequence[Data]) -> Data:
    return Data(np.concatenate([p.inputs for p in parts]), np.concatenate([p.targets for p in parts]))


def start(seed: int = 99) -> Model:
    return Model(np.random.default_rng(seed).normal(size=SIZE).astype(np.float32), LAYOUT)


def aggregate_of(strategy: AnyStrategy, updates: Sequence[Array], examples: int = 20) -> Aggregate:
    pipeline = Pipeline(strategy.reduction)
    state = pipeline.start(SIZE)
    for number, vector in enumerate(updates):
        state = pipeline.fold(state, Update(f"site-{number}", vector, examples))
    return pipeline.finish(state)


def run(strategy: AnyStrategy, rounds: int, update: Callable[[Array], Sequence[Array]]) -> list[Array]:
    """The models of a run with full participation in which `update` gives the sites' vectors."""
    state = strategy.init(start())
    models = [state.model.copy()]
    for number in range(1, rounds + 1):
        strategy.order(state, number)
        state = strategy.step(state, aggregate_of(strategy, update(state.model)))
        models.append(state.model.copy())
    return models


def centralised(optimizer: Optimizer, rounds: int, data: Data) -> list[Array]:
    """Plain full-batch training on the pooled data, in float64 throughout."""
    theta = start().vector.astype(np.float64)
    first, second = np.zeros(SIZE), np.zeros(SIZE)
    models = [theta.astype(np.float32)]
    for step in range(1, rounds + 1):
        residual = data.inputs @ theta[:TRAINABLE] - data.targets
        gradient = np.zeros(SIZE)
        gradient[:TRAINABLE] = data.inputs.T @ residual / len(data.targets)
        if optimizer.kind == "sgd":
            theta = theta - optimizer.learning_rate * gradient
        elif optimizer.kind == "momentum":
            first = optimizer.momentum * first + gradient
            theta = theta - optimizer.learning_rate * first
        else:
            first = optimizer.beta1 * first + (1 - optimizer.beta1) * gradient
            second = optimizer.beta2 * second + (1 - optimizer.beta2) * gradient**2
            unbiased = first / (1 - optimizer.beta1**step), second / (1 - optimizer.beta2**step)
            theta = theta - optimizer.learning_rate * unbiased[0] / (np.sqrt(unbiased[1]) + optimizer.epsilon)
        models.append(theta.astype(np.float32))
    return models


def assert_close(one: Sequence[Array], two: Sequence[Array], tolerance: float = 2e-5) -> None:
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first, second, rtol=tolerance, atol=tolerance)
    assert np.abs(one[-1] - one[0]).max() > 0.05, "a law about a model that does not move says nothing"


# The laws.


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.sampled_from([0.01, 0.05, 0.1]), st.integers(0, 5))
def test_fedavg_with_one_full_batch_step_equals_mirrored_sgd_equals_centralised_sgd(count, rate, seed):
    parts = sites(count, seed=seed)

    def deltas(model: Array) -> list[Array]:
        return [np.float32(-rate) * part.gradient(model) for part in parts]

    def gradients(model: Array) -> list[Array]:
        return [part.gradient(model) for part in parts]

    averaged = run(FedAvg(weighting="uniform"), 25, deltas)
    mirrored = run(MirroredSgd("sgd", rate, weighting="uniform"), 25, gradients)
    central = centralised(Optimizer("sgd", rate), 25, pooled(parts))
    assert_close(averaged, mirrored)
    assert_close(mirrored, central)


def test_fedavg_by_examples_equals_centralised_sgd_on_parts_of_unequal_size():
    parts = [replace_size(part, size) for part, size in zip(sites(3), (3, 20, 11), strict=True)]
    rate = 0.05
    strategy = FedAvg(weighting="examples")
    state = strategy.init(start())
    models = [state.model]
    for _ in range(20):
        fold = Pipeline(strategy.reduction)
        total = fold.start(SIZE)
        for number, part in enumerate(parts):
            delta = np.float32(-rate) * part.gradient(state.model)
            total = fold.fold(total, Update(str(number), delta, len(part.targets)))
        state = strategy.step(state, fold.finish(total))
        models.append(state.model)
    assert_close(models, centralised(Optimizer("sgd", rate), 20, pooled(parts)))


def replace_size(part: Data, size: int) -> Data:
    return Data(part.inputs[:size], part.targets[:size])


@each_kind
def test_mirrored_sgd_equals_the_same_optimiser_on_the_pooled_data(kind: Kind):
    parts = sites(4)
    strategy = MirroredSgd(kind, 0.02)
    mirrored = run(strategy, 30, lambda model: [part.gradient(model) for part in parts])
    assert_close(mirrored, centralised(strategy.mirror_optimizer, 30, pooled(parts)), 2e-4)


def test_the_learning_rate_of_fedavgs_server_scales_the_mean_delta_and_leaves_buffers_averaged():
    """Reddi et al. 2021, Algorithm 1 with plain SGD as the server's optimiser."""
    updates = [np.full(SIZE, v, np.float32) for v in (1.0, 3.0)]
    for rate in (0.25, 1.0, 1.5):
        strategy = FedAvg(rate)
        moved = strategy.step(strategy.init(start()), aggregate_of(strategy, updates)).model
        expected = start().vector + np.float32(2)
        expected[:TRAINABLE] = start().vector[:TRAINABLE] + np.float32(2 * rate)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)


# Mirrors.


@each_kind
def test_mirrors_stay_bit_identical_to_the_server_over_a_hundred_rounds(kind: Kind):
    """Each mirror receives the averaged gradient alone, and one that joins late the model and the slots."""
    parts = sites(5)
    strategy = MirroredSgd(kind, 0.05)
    state = strategy.init(start())
    begin = strategy.order(state, 1)
    assert begin.advance is None
    assert begin.optimizer is not None
    assert begin.slots is not None
    mirrors = [(start().vector.copy(), copy.deepcopy(begin.slots)) for _ in parts]
    random = np.random.default_rng(0)
    for number in range(1, 101):
        noise = [random.normal(size=SIZE).astype(np.float32) for _ in parts]  # a tail that moves, too
        updates = [part.gradient(m) + n for part, (m, _), n in zip(parts, mirrors, noise, strict=True)]
        state = strategy.step(state, aggregate_of(strategy, updates))
        order = strategy.order(state, number + 1)
        assert order.advance is not None
        received = np.frombuffer(order.advance.gradient.tobytes(), np.float32)  # as over a wire
        mirrors = [
            advance(order.advance.optimizer, model, slots, received, trainable=TRAINABLE)
            for model, slots in mirrors
        ]
        if number == 50:
            mirrors[0] = (state.model.copy(), copy.deepcopy(order.slots))
        for model, slots in mirrors:
            assert model.tobytes() == state.model.tobytes()
            for one, two in zip(slots.vectors, state.slots.vectors, strict=True):
                assert one.tobytes() == two.tobytes()
            assert (slots.beta1_power, slots.beta2_power) == (
                state.slots.beta1_power,
                state.slots.beta2_power,
            )


def test_the_tail_of_a_mirror_moves_by_the_mean_change_and_not_by_the_optimiser():
    update = np.arange(1, SIZE + 1, dtype=np.float32)
    for kind in ("sgd", "momentum", "adam"):
        strategy = MirroredSgd(kind, 0.5)
        moved = strategy.step(strategy.init(start()), aggregate_of(strategy, [update, 3 * update])).model
        np.testing.assert_array_equal(moved[TRAINABLE:], start().vector[TRAINABLE:] + 2 * update[TRAINABLE:])
        assert [len(slot) for slot in strategy.init(start()).slots.vectors] in (
            [],
            [TRAINABLE],
            [TRAINABLE] * 2,
        )


# Gradients on arrival.


@each_kind
def test_sgd_applies_each_gradient_as_it_arrives(kind: Kind):
    strategy = Sgd(kind, 0.05)
    state = strategy.init(start())
    theta, slots = start().vector[:TRAINABLE], init_slots(strategy.server_optimizer, TRAINABLE)
    parts = sites(3)
    for number in range(12):
        gradient = parts[number % 3].gradient(state.model)
        theta, slots = apply(strategy.server_optimizer, theta, slots, gradient[:TRAINABLE])
        state = strategy.step(state, aggregate_of(strategy, [gradient]))
        assert state.model[:TRAINABLE].tobytes() == theta.tobytes()


def test_sgd_with_one_client_and_no_staleness_is_sgd():
    (part,) = sites(1)
    central = centralised(Optimizer("sgd", 0.05), 30, part)
    assert_close(run(Sgd("sgd", 0.05), 30, lambda model: [part.gradient(model)]), central)


def test_sgd_bounds_staleness_and_the_others_work_in_rounds():
    assert {name: s.max_staleness for name, s in STRATEGIES.items() if s.max_staleness is not None} == {
        "sgd": 16,
        "sgd with momentum": 0,
        "sgd with adam": 3,
    }


def test_sgd_does_not_weigh_a_gradient_by_the_examples_its_client_claims():
    pipeline = Pipeline(Sgd().reduction)
    state = pipeline.start(SIZE)
    for name, value, claim in (("honest", 1.0, 1), ("boastful", 3.0, 10**6)):
        state = pipeline.fold(state, Update(name, np.full(SIZE, value, np.float32), claim))
    moved = Sgd("sgd", 0.5).step(Sgd().init(start()), pipeline.finish(state)).model
    np.testing.assert_allclose(moved[:TRAINABLE], start().vector[:TRAINABLE] - 1.0, rtol=1e-6)


# What every strategy keeps to.


def frozen_copy(model: Model) -> Model:
    vector = model.vector.copy()
    vector.setflags(write=False)
    return Model(vector, model.layout)


def snapshot(value: object) -> object:
    """All that a state holds, by value."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, snapshot(getattr(value, field.name))) for field in fields(value)]
    if isinstance(value, tuple):
        return [snapshot(item) for item in value]
    return value


def some_aggregate(strategy: AnyStrategy, seed: int) -> Aggregate:
    random = np.random.default_rng(seed)
    return aggregate_of(strategy, [random.normal(size=SIZE).astype(np.float32) for _ in range(3)])


@each_strategy
def test_a_strategy_is_a_frozen_comparable_printable_value(strategy):
    assert isinstance(strategy, Strategy)
    assert is_dataclass(strategy)
    assert replace(strategy) == strategy
    assert hash(replace(strategy)) == hash(strategy)
    for field in fields(strategy):
        assert f"{field.name}={getattr(strategy, field.name)!r}" in repr(strategy)
        with pytest.raises(FrozenInstanceError):
            setattr(strategy, field.name, None)


@each_strategy
def test_the_repr_of_a_strategy_makes_it_again(strategy):
    assert eval(repr(strategy), {type(strategy).__name__: type(strategy)}) == strategy


@each_strategy
def test_hyperparameters_are_at_most_eight(strategy):
    assert len(fields(strategy)) <= 8


@each_strategy
def test_a_run_begins_with_the_model_it_is_given_and_leaves_it_as_it_was(strategy):
    given_ = frozen_copy(start())
    state = strategy.init(given_)
    assert isinstance(state.model, np.ndarray)
    assert state.model.tobytes() == start().vector.tobytes()
    for seed in range(3):
        strategy.order(state, seed + 1)
        state = strategy.step(state, some_aggregate(strategy, seed))
    assert given_.vector.tobytes() == start().vector.tobytes()


@each_strategy
def test_every_state_holds_a_contiguous_float32_model_of_the_layouts_size(strategy):
    state: State = strategy.init(start())
    for seed in range(3):
        LAYOUT.check(state.model)
        state = strategy.step(state, some_aggregate(strategy, seed))
    LAYOUT.check(state.model)


@each_strategy
def test_init_and_order_and_step_leave_the_state_as_it_was(strategy):
    state = strategy.init(start())
    for seed in range(3):
        before = snapshot(state)
        assert snapshot(strategy.order(state, seed + 1)) == snapshot(strategy.order(state, seed + 1))
        after = strategy.step(state, some_aggregate(strategy, seed))
        assert snapshot(state) == before
        assert not np.shares_memory(after.model, state.model)
        state = after


@each_strategy
def test_a_later_step_leaves_earlier_states_as_they_were(strategy):
    """A step may consume its aggregate, never what earlier states share with it."""
    states, snapshots = [strategy.init(start())], []
    for seed in range(4):
        states.append(strategy.step(states[-1], some_aggregate(strategy, seed)))
        snapshots.append(snapshot(states[-1]))
    assert [snapshot(state) for state in states[1:]] == snapshots


@each_strategy
def test_a_strategy_is_deterministic_and_shares_nothing_between_runs(strategy):
    def history() -> list[object]:
        state = strategy.init(start())
        out = [snapshot(state)]
        for seed in range(4):
            out.append(snapshot(strategy.order(state, seed + 1)))
            state = strategy.step(state, some_aggregate(strategy, seed))
            out.append(snapshot(state))
        return out

    assert history() == history()


@each_strategy
def test_states_are_frozen(strategy):
    state = strategy.init(start())
    for field in fields(state):
        with pytest.raises(FrozenInstanceError):
            setattr(state, field.name, None)


@each_strategy
def test_the_reduction_is_a_value_and_always_the_same(strategy):
    assert strategy.reduction == strategy.reduction
    assert isinstance(strategy.reduction, Mean)


@each_strategy
def test_an_order_says_what_to_do_and_carries_no_model(strategy):
    state = strategy.init(start())
    for number in range(1, 4):
        order = strategy.order(state, number)
        assert isinstance(order, Order)
        assert order.kind in ("train", "gradient")
        assert (order.optimizer is None) == (order.slots is None)
        state = strategy.step(state, some_aggregate(strategy, number))


@each_strategy
def test_a_zero_aggregate_at_the_start_moves_nothing(strategy):
    state = strategy.step(strategy.init(start()), aggregate_of(strategy, [np.zeros(SIZE, np.float32)]))
    np.testing.assert_array_equal(state.model, start().vector)


@each_strategy
def test_a_model_without_trainable_parameters_and_an_empty_model_are_fine(strategy):
    for layout in (Layout((Tensor("mean", (4,), role="buffer"),)), Layout(())):
        state = strategy.init(Model(np.zeros(layout.size, np.float32), layout))
        strategy.order(state, 1)
        aggregate = Aggregate(np.zeros(layout.size, np.float32), ("a",), 1)
        assert strategy.step(state, aggregate).model.shape == (layout.size,)
