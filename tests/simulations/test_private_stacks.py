"""Members of a stack who protect their examples do what each would do alone: same samples, clips and noise."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import config, convolution, data, perceptron, task
from torch import nn
from torch.utils.data import TensorDataset

from fedge import Site, Task
from fedge.privacy.example import ExampleLevel
from fedge.privacy.secure import SecureSource
from fedge.run import Work
from fedge_client.torch.framework import framework
from fedge_client.torch.private.steps import Private
from fedge_client.torch.trainer import Trainer
from fedge_sim import simulate
from fedge_sim.engines.cohort import Cohort, Member
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.model import StackedModel

MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 3),
    "perceptron": perceptron,
    "normalised": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
    "convolution": convolution,
    "twice": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ),
}


def private(at: int, *, noise: float = 0.7, clip: float = 0.5) -> Private:
    """The same words each time: a source serves one piece of work."""
    return Private(ExampleLevel(clip, noise), SecureSource(bytes([at]) * 32))


def sets(count: int) -> list[TensorDataset]:
    return [data(Site(f"client-{at}", index=at, count=count))[0] for at in range(count)]


def train(
    task: Task, trains: list[Any], work: Work, **level: float
) -> tuple[np.ndarray, np.ndarray, list[Any], list[Any]]:
    """By a stack and by the loop: vectors and outcomes."""
    model = framework.initial_model(task, seed=3).vector
    stacked, looped = (np.empty((len(trains), len(model)), np.float32) for _ in range(2))
    members = [Member(each, at, private(at, **level)) for at, each in enumerate(trains)]
    cohort = Cohort(StackedModel(task, seed=3))
    found = cohort.train(torch.from_numpy(model), members, work, torch.from_numpy(stacked))
    trainer = Trainer(task, seed=3)
    trainer.prepare_private(model, max(trains, key=len))
    expected = [
        trainer.train(model, each, work, seed=at, out=row, private=private(at, **level))
        for at, (each, row) in enumerate(zip(trains, looped, strict=True))
    ]
    return stacked, looped, found, expected


WORK = st.builds(
    Work,
    epochs=st.integers(1, 3),
    batch_size=st.sampled_from([1, 4, 7, 64, "full"]),
    optimizer=st.sampled_from(["sgd", "momentum"]),
    learning_rate=st.sampled_from([0.01, 0.1]),
    l1=st.sampled_from([0.0, 0.01]),
    l2=st.sampled_from([0.0, 0.1]),
    proximal=st.sampled_from([0.0, 1.0]),
)


@given(
    model=st.sampled_from(list(MODELS)),
    count=st.integers(1, 8),
    work=WORK,
    clip=st.sampled_from([1e-3, 0.5, 100.0]),
)
@settings(max_examples=20, deadline=None)
def test_ragged_clients_train_privately_as_the_loop_does(model: str, count: int, work: Work, clip: float):
    stacked, looped, found, expected = train(
        Task(MODELS[model], data, F.cross_entropy), sets(count), work, clip=clip
    )
    grid = (
        2.0**-14 * 0.7 * clip * work.learning_rate * 3 * 8
    )  # noise is rounded to it, after float32 has rounded sums
    assert np.allclose(stacked, looped, rtol=1e-3, atol=grid + 1e-6)
    assert found == expected


@given(model=st.sampled_from(list(MODELS)), count=st.integers(1, 8), batch=st.sampled_from([1, 5, "full"]))
@settings(max_examples=10, deadline=None)
def test_private_gradients_are_those_of_the_loop(model: str, count: int, batch: Any):
    chosen, work = Task(MODELS[model], data, F.cross_entropy), Work(batch_size=batch, l2=0.1)
    start = framework.initial_model(chosen, seed=3).vector
    stacked, row = np.empty((count, len(start)), np.float32), np.empty(len(start), np.float32)
    trains = sets(count)
    members = [Member(each, at, private(at)) for at, each in enumerate(trains)]
    cohort, trainer = Cohort(StackedModel(chosen, seed=3)), Trainer(chosen, seed=3)
    found = cohort.gradient(torch.from_numpy(start), members, work, torch.from_numpy(stacked), step=6)
    trainer.prepare_private(start, trains[-1])
    for at, each in enumerate(trains):
        alone = trainer.gradient(start, each, work, seed=at, step=6, out=row, private=private(at))
        assert found[at] == alone
        assert np.allclose(stacked[at], row, rtol=1e-3, atol=1e-4)


def test_samples_larger_than_a_pass_are_clipped_in_several(monkeypatch: pytest.MonkeyPatch):
    from fedge_sim.engines import noisy

    monkeypatch.setattr(noisy, "PHYSICAL_ROWS", 4)
    stacked, looped, _, _ = train(task, sets(8), Work(batch_size=20))
    assert np.allclose(stacked, looped, rtol=1e-3, atol=1e-5)


def test_examples_without_a_finite_gradient_add_nothing():
    trains = sets(4)
    for each in trains[1:]:
        each.tensors[0][1, 2] = torch.inf
    stacked, looped, found, expected = train(task, trains, Work(batch_size="full", epochs=2))
    assert np.isfinite(stacked).all()
    assert np.allclose(stacked, looped, rtol=1e-3, atol=1e-5)
    assert found == expected


def test_a_step_without_any_example_is_a_step_of_noise():
    few = [TensorDataset(torch.ones(60, 6), torch.zeros(60, dtype=torch.int64)) for _ in range(3)]
    stacked, looped, _, _ = train(task, few, Work(batch_size=1, epochs=1))  # of 60 samples many are empty
    assert np.allclose(stacked, looped, rtol=1e-3, atol=1e-5)


def test_noise_has_the_size_that_it_says_in_a_stack():
    work = Work(batch_size="full", epochs=1, learning_rate=1.0)
    trains = [data(Site("a", index=2, count=3))[0]] * 40
    (quiet, *_), (loud, *_) = (train(task, trains, work, noise=noise, clip=0.5) for noise in (1e-20, 3.0))
    assert (loud - quiet).std() == pytest.approx(3.0 * 0.5 / len(trains[0]), rel=0.05)


def test_there_is_room_for_the_gradient_of_each_example_or_the_loop_has_them(monkeypatch: pytest.MonkeyPatch):
    trains, work = sets(6), Work(batch_size=8, epochs=2)
    expected = train(task, trains, work)[0]
    model = StackedModel(task, seed=3)
    start = torch.from_numpy(framework.initial_model(task, seed=3).vector)
    members, out = (
        [Member(each, at, private(at)) for at, each in enumerate(trains)],
        torch.empty(6, model.size),
    )
    model.max_bytes = 2 * 4 * 16 * model.size  # two at once
    Cohort(model).train(start, members, work, out)
    assert np.allclose(out.numpy(), expected, rtol=1e-4, atol=1e-6)
    model.max_bytes = 100
    with pytest.raises(UnsuitedError, match="the gradients of 16 examples are more than"):
        Cohort(model).train(start, members, work, out)


class Clamped(nn.Module):
    """Changes its parameter while it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-0.1, 0.1)
        return self.linear(inputs)


class Lucky(nn.Module):
    """Draws random numbers that torch knows nothing of."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(6, 3), draw

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) * self.draw()


DRAWING: dict[str, Callable[[], nn.Module]] = {
    "python's": lambda: Lucky(random.random),
    "numpy's": lambda: Lucky(np.random.random),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)),
}


@pytest.mark.parametrize(
    ("model", "says", "is_private"),
    [
        (Clamped, "changes what it is given|torch.func cannot do it", True),
        *(
            (each, "draws random numbers", is_private)
            for each in DRAWING.values()
            for is_private in (True, False)
        ),
    ],
    ids=["changes itself", *(f"{each}, {kind}" for each in DRAWING for kind in ("private", "open"))],
)
def test_a_model_that_does_more_than_compute_is_left_to_the_loop(model: Any, says: str, is_private: bool):
    chosen = Task(model, data, F.cross_entropy)
    start = torch.from_numpy(framework.initial_model(chosen, seed=3).vector)
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    member = Member(sets(4)[3], 0, private(0) if is_private else None)
    with pytest.raises(UnsuitedError, match=says):
        Cohort(StackedModel(chosen, seed=3)).train(
            start, [member], Work(batch_size=4), torch.empty(1, len(start))
        )
    assert random.getstate() == before[0]
    assert np.random.get_state()[2] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


PRIVACY = {
    "unit": "example",
    "epsilon": 50.0,
    "delta": 1e-3,
    "clip": 1.0,
    "evaluation_noise_multiplier": 50.0,
}


def test_a_private_run_in_stacks_costs_and_learns_what_the_loops_does(caplog: pytest.LogCaptureFixture):
    tables: dict[str, Any] = {"privacy": PRIVACY, "evaluation": {"every": 2}}
    with caplog.at_level(logging.WARNING):
        found, expected = (
            simulate(config(**tables), task=task, engine=each) for each in ("vectorised", "loop")
        )
    assert not caplog.records
    assert (found.engine, found.privacy) == ("vectorised", expected.privacy)
    assert np.allclose(found.model.vector, expected.model.vector, rtol=1e-3, atol=1e-4)
    assert [row.clients for row in found.history] == [row.clients for row in expected.history]


def test_a_model_that_cannot_be_private_is_refused_in_a_stack_as_in_the_loop():
    def mixing() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.Softmax(dim=0), nn.Linear(4, 3))

    chosen = replace(task, model=mixing)
    reasons = [simulate_to_the_end(chosen, engine) for engine in ("vectorised", "loop")]
    assert reasons[0] == reasons[1]
    assert "failed" in reasons[0]


def simulate_to_the_end(chosen: Task, engine: Any) -> str:
    found = simulate(config(privacy=PRIVACY), task=chosen, engine=engine)
    return f"{found.status}: {found.reason}"
