"""Clients who judge together come to what each comes to alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fedge import Task
from fedge.errors import TaskError
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer
from fedge_sim.engines import judge
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.judge import Judge


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def worst(output: torch.Tensor, target: torch.Tensor) -> float:
    return float((output.argmax(1) != target).float().max())


def task_of(model: Callable[[], nn.Module], loss: Any = F.cross_entropy, **metrics: Any) -> Task:
    return Task(model=model, data=lambda site: (None, None), loss=loss, metrics=metrics)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 3),
    "normalised": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)),
}
WHOLE = TensorDataset(
    torch.randn(200, 6, generator=torch.Generator().manual_seed(1)),
    torch.randint(3, (200,), generator=torch.Generator().manual_seed(2)),
)


class Pairs(Dataset[Any]):
    """What does not lie in tensors."""

    def __init__(self, start: int, stop: int) -> None:
        self._range = range(start, stop)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Any:
        return WHOLE[self._range[index]]


def sets(sizes: list[int]) -> list[Any]:
    """Parts of one set, sets of their own and sets that are no tensors, in turn."""
    made: list[Any] = []
    at = 0
    for number, size in enumerate(sizes):
        stop = at + size
        part = WHOLE[at:stop]
        made.append((Subset(WHOLE, list(range(at, stop))), TensorDataset(*part), Pairs(at, stop))[number % 3])
        at = stop
    return made


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9), name=st.sampled_from(list(MODELS)))
@settings(max_examples=25, deadline=None)
def test_together_they_come_to_what_each_comes_to(sizes: list[int], name: str):
    task = task_of(MODELS[name], accuracy=accuracy, worst=worst)
    model = framework.initial_model(task, seed=3).vector
    trainer = Trainer(task, seed=3)
    alone = [trainer.evaluate(model, each) for each in sets(sizes)]
    together = Judge(task, seed=9).judge(model, sets(sizes))
    for one, other in zip(together, alone, strict=True):
        assert one is not None
        assert one.num_examples == other.num_examples
        assert one.metrics == pytest.approx(dict(other.metrics), rel=1e-4, abs=1e-5)


def test_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch):
    task = task_of(MODELS["linear"], accuracy=accuracy)
    model = framework.initial_model(task, seed=3).vector
    whole = Judge(task, seed=3).judge(model, sets([5, 9, 2, 7, 1]))
    monkeypatch.setattr(judge, "MAX_BYTES", 200)
    some = Judge(task, seed=3).judge(model, sets([5, 9, 2, 7, 1]))
    for one, other in zip(some, whole, strict=True):
        assert one is not None
        assert other is not None
        assert one.metrics == pytest.approx(dict(other.metrics), rel=1e-5)


class Centred(nn.Module):
    """Looks at the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(inputs - inputs.mean(0))
        return found


class Noisy(nn.Module):
    """Draws random numbers whenever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(inputs + torch.randn_like(inputs))
        return found


def noisy_metric(output: torch.Tensor, target: torch.Tensor) -> float:
    return float(torch.rand(()))


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (task_of(Centred), "mixes the examples"),
        (task_of(Noisy), "draws random numbers when it is judged"),
        (task_of(MODELS["linear"], noise=noisy_metric), "its loss or a metric draws random numbers"),
        (task_of(lambda: nn.Sequential(nn.Linear(6, 3), nn.Flatten(0))), "not a row for each example"),
        (task_of(lambda: nn.Linear(5, 3)), "cannot be judged together: RuntimeError"),
    ],
    ids=["mixing", "noise", "a noisy metric", "no rows", "another shape"],
)
def test_what_cannot_be_judged_together_is_left_to_the_loop(task: Task, says: str):
    model = framework.initial_model(task, seed=3).vector
    with pytest.raises(UnsuitedError, match=says):
        Judge(task, seed=3).judge(model, sets([4, 5, 6]))


def test_sets_of_several_shapes_cannot_be_judged_together():
    task = task_of(MODELS["linear"])
    odd = TensorDataset(torch.randn(3, 7), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UnsuitedError, match="several shapes or types"):
        Judge(task, seed=3).judge(framework.initial_model(task, seed=3).vector, [*sets([4]), odd])


def test_whose_set_or_metric_fails_is_left_out_and_the_others_are_not():
    def fails(output: torch.Tensor, target: torch.Tensor) -> float:
        if len(output) == 5:
            raise ValueError("five")
        return 1.0

    task = task_of(MODELS["linear"], odd=fails)
    model = framework.initial_model(task, seed=3).vector
    found = Judge(task, seed=3).judge(
        model, [*sets([4, 5, 6]), TensorDataset(torch.empty(0, 6), torch.empty(0))]
    )
    assert [each is not None for each in found] == [True, False, True, False]
    with pytest.raises(TaskError, match="five"):
        Trainer(task, seed=3).evaluate(model, sets([4, 5])[1])
    assert np.isfinite(found[0].metrics["loss"])  # type: ignore[union-attr]  # it is there
