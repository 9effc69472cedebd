"""The edges of private training, each with its defined outcome, at both levels, through the whole of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedge import RunConfig, Site, Task
from fedge.errors import RefusedError
from fedge.refusal import RefusalCode
from fedge_client.torch.framework import framework
from fedge_client.torch.private import group_norm_for_batch_norm
from fedge_sim import Result, simulate

CLIENTS, ROUNDS = 4, 3
BOTH = pytest.mark.parametrize("unit", ["example", "client"])


def data_of(size: int, *, spoilt: bool = False) -> Callable[[Site], tuple[TensorDataset, TensorDataset]]:
    """`size` examples for each client; where `spoilt`, half of those of the last one are not finite."""

    def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
        assert site.index is not None
        inputs = torch.randn(size + 3, 4, generator=torch.Generator().manual_seed(site.index))
        labels = inputs[:, :3].argmax(1)
        if spoilt and site.index == CLIENTS - 1:
            inputs[: size // 2 : 2], inputs[1 : size // 2 : 2] = float("nan"), float("inf")
        return TensorDataset(inputs[:size], labels[:size]), TensorDataset(inputs[size:], labels[size:])

    return data


class Odd(nn.Module):
    """A 0-d parameter, an integer buffer, a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.0))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x) + self.fixed + 0 * self.count


class Counting(Odd):
    """Its integer buffer counts the examples that it was trained on."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return super().forward(x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


TASK = Task(model=lambda: nn.Linear(4, 3), data=data_of(20), loss=F.cross_entropy)


def flat(output: Tensor, target: Tensor) -> Tensor:
    """A loss that nothing can lower."""
    return 0 * F.cross_entropy(output, target)


def run(task: Task, unit: str, *, sigma: float = 1.0, quorum: int = CLIENTS, **tables: Any) -> Result:
    config = RunConfig.from_table(
        {
            "name": "edges",
            "task": "app:task",
            "rounds": ROUNDS,
            "work": {"batch_size": 8, "learning_rate": 0.1},
            "cohort": {"size": CLIENTS, "quorum": quorum},
            "privacy": {"unit": unit, "delta": 1e-5, "clip": 1.0, "noise_multiplier": sigma},
            "evaluation": {"every": 0},
            "simulation": {"clients": CLIENTS},
            **tables,
        },
        source="run.toml",
    )
    return simulate(config, task=task)


def moved(result: Result, task: Task) -> np.ndarray:
    unit = result.run.privacy.unit
    before = framework.initial_model(task, seed=result.run.seed, unit=unit).vector
    return result.model.vector - before


def everybody_took_part(result: Result) -> bool:
    assert (result.status, result.reason) == ("done", "")
    assert np.isfinite(result.model.vector).all()
    return all(len(row.clients) == CLIENTS and row.refused == 0 for row in result.history)


@BOTH
@pytest.mark.parametrize("size", [1, 3], ids=["one example", "fewer than a batch"])
def test_little_data_is_trained_on_whole_and_paid_for_as_a_release_of_all_of_it(unit: str, size: int):
    task = replace(TASK, data=data_of(size))
    result = run(task, unit)
    assert everybody_took_part(result)
    assert moved(result, task).all()
    # One step a round on everything there is, by either level: three Gaussian releases.
    assert result.privacy.epsilon == pytest.approx(run(TASK, "client").privacy.epsilon)


@pytest.mark.parametrize("batch_size", [1, 8], ids=["alone in their batches", "among others"])
def test_at_example_level_what_is_not_finite_in_some_examples_counts_as_nothing(batch_size: int):
    task = replace(TASK, data=data_of(20, spoilt=True))
    work = {"batch_size": batch_size, "learning_rate": 0.1, "steps": 6}
    assert everybody_took_part(run(task, "example", work=work))


def test_at_client_level_an_update_that_is_not_finite_stays_at_its_site_and_the_others_go_on():
    result = run(replace(TASK, data=data_of(20, spoilt=True)), "client", quorum=CLIENTS - 1)
    assert result.status == "done"
    assert np.isfinite(result.model.vector).all()
    assert [(len(row.clients), row.refused) for row in result.history] == [(CLIENTS - 1, 1)] * ROUNDS


@BOTH
def test_updates_of_zero_are_noised_like_any_other(unit: str):
    task = replace(TASK, loss=flat)
    one, more = run(task, unit), run(task, unit, sigma=100.0)
    assert everybody_took_part(one)
    assert moved(one, task).all()
    # Nothing but noise has moved it: a hundred times as much moves it a hundred times as far.
    np.testing.assert_allclose(moved(more, task), 100 * moved(one, task), rtol=1e-3, atol=1e-2)


@BOTH
def test_samples_may_be_empty(unit: str):
    """At a rate of 1/400 most samples are: each is a step, with its noise and its price."""
    task = replace(TASK, data=data_of(400))
    result = run(task, unit, work={"batch_size": 1, "steps": 20, "learning_rate": 0.1})
    assert everybody_took_part(result)
    assert moved(result, task).all()
    assert result.privacy.epsilon is not None
    assert result.privacy.epsilon > 0


@BOTH
def test_a_parameter_without_dimensions_is_noised_and_what_is_not_trained_is_left_alone(unit: str):
    task = replace(TASK, model=Odd)
    result = run(task, unit)
    assert everybody_took_part(result)
    change, trainable = moved(result, task), result.model.layout.trainable_size
    assert change[:trainable].all()
    assert trainable == 4 * 3 + 3 + 1
    assert not change[trainable:].any()
    assert len(change) > trainable


@BOTH
def test_an_integer_buffer_that_training_changes_stays_at_the_site(unit: str):
    plain, counting = (run(replace(TASK, model=model), unit) for model in (Odd, Counting))
    assert everybody_took_part(counting)
    assert plain.model.layout == counting.model.layout
    np.testing.assert_array_equal(plain.model.vector, counting.model.vector)


@BOTH
def test_a_model_with_batch_norm_is_refused_with_a_remedy_that_works(unit: str):
    with pytest.raises(RefusedError, match="GroupNorm") as refused:
        run(replace(TASK, model=Normed), unit)
    assert refused.value.refusal.code == RefusalCode.MODEL_NOT_PRIVATE
    assert "group_norm_for_batch_norm" in str(refused.value)
    assert everybody_took_part(run(replace(TASK, model=lambda: group_norm_for_batch_norm(Normed())), unit))
