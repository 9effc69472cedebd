"""The laws of the algorithms with the real trainer: FedAvg of one step is mirrored SGD is plain SGD."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedge import RunConfig, Site, Task
from fedge.vector import Array
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module
from fedge_sim import simulate

CLIENTS, EXAMPLES, ROUNDS, RATE, SEED = 3, 12, 8, 0.3, 11


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Equally many examples at each site, of different distributions."""
    assert site.index is not None
    random = torch.Generator().manual_seed(site.index)
    inputs = torch.randn(EXAMPLES, 5, generator=random) + site.index
    train = TensorDataset(inputs, (inputs.sum(1) > 5 * site.index).long() + (site.index == 2))
    return train, train


TASK = Task(model=model, data=data, loss=F.cross_entropy)


def simulated(strategy: dict[str, Any], **work: Any) -> Array:
    table = {
        "name": "law",
        "task": "app:task",
        "rounds": ROUNDS,
        "seed": SEED,
        "strategy": strategy,
        "work": {"batch_size": "full", **work},
        "cohort": {"size": CLIENTS},
        "evaluation": {"every": 0},
        "simulation": {"clients": CLIENTS},
    }
    result = simulate(RunConfig.from_table(table, source="law"), task=TASK)
    assert result.status == "done"
    return result.model.vector


def start() -> Array:
    return FlatModule(build_module(TASK, seed=SEED)).vector


def centralised(make: Any, *, l1: float = 0.0, l2: float = 0.0) -> Array:
    """Torch's own full-batch training on the pooled data; torch's weight decay is our l2."""
    module = build_module(TASK, seed=SEED)
    optimizer = make(module.parameters(), weight_decay=l2)
    inputs, labels = (
        torch.cat(parts)
        for parts in zip(*(data(Site("", index=index))[0].tensors for index in range(CLIENTS)), strict=True)
    )
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(inputs), labels)
        loss = loss + l1 * sum(parameter.abs().sum() for parameter in module.parameters())
        loss.backward()
        optimizer.step()
    return FlatModule(module).vector


def assert_same(one: Array, two: Array, *, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(one, two, rtol=rtol, atol=atol)
    assert np.abs(one - start()).max() > 0.05, "a law about a model that does not move says nothing"


def sgd(parameters: Any, *, weight_decay: float = 0.0, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=momentum, weight_decay=weight_decay)


REGULARISED = pytest.mark.parametrize(
    "terms", [{}, {"l2": 0.05}, {"l1": 0.01}, {"l1": 0.01, "l2": 0.05}], ids=["plain", "l2", "l1", "both"]
)


@REGULARISED
def test_fedavg_of_one_full_batch_step_is_mirrored_sgd_is_sgd_on_the_pooled_data(terms: dict[str, float]):
    averaged = simulated(
        {"name": "fedavg", "weighting": "uniform"}, steps=1, optimizer="sgd", learning_rate=RATE, **terms
    )
    mirrored = simulated(
        {"name": "mirrored_sgd", "optimizer": "sgd", "learning_rate": RATE, "weighting": "uniform"}, **terms
    )
    central = centralised(sgd, **terms)
    assert_same(averaged, mirrored)
    assert_same(mirrored, central)


def test_with_equally_many_examples_their_weights_are_uniform():
    by_examples = simulated({"name": "fedavg"}, steps=1, learning_rate=RATE)
    uniform = simulated({"name": "fedavg", "weighting": "uniform"}, steps=1, learning_rate=RATE)
    assert_same(by_examples, uniform, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_momentum_mirrors_are_torchs_sgd_with_momentum_on_the_pooled_data(l2: float):
    strategy = {"name": "mirrored_sgd", "optimizer": "momentum", "learning_rate": RATE, "momentum": 0.8}
    central = centralised(lambda parameters, **decay: sgd(parameters, momentum=0.8, **decay), l2=l2)
    assert_same(simulated(strategy, l2=l2), central)


def test_adam_mirrors_are_torchs_adam_on_the_pooled_data():
    """Adam divides by what may be tiny: rounding is enlarged where a gradient is next to nothing."""
    strategy = {"name": "mirrored_sgd", "optimizer": "adam", "learning_rate": 0.02, "epsilon": 1e-6}
    central = centralised(
        lambda parameters, **decay: torch.optim.Adam(parameters, lr=0.02, eps=1e-6, **decay)
    )
    assert_same(simulated(strategy), central, rtol=1e-3, atol=1e-4)


def test_the_servers_learning_rate_times_the_clients_is_the_rate_of_the_step():
    halved = {"name": "fedavg", "weighting": "uniform", "server_learning_rate": 0.5}
    assert_same(simulated(halved, steps=1, learning_rate=2 * RATE), centralised(sgd))


def test_one_client_with_gradients_on_arrival_is_plain_sgd_on_its_data():
    table = {
        "name": "law",
        "task": "app:task",
        "rounds": ROUNDS,
        "seed": SEED,
        "strategy": {"name": "sgd", "learning_rate": RATE},
        "work": {"batch_size": "full"},
        "cohort": {"size": 1},
        "evaluation": {"every": 0},
        "simulation": {"clients": 1},
    }
    found = simulate(RunConfig.from_table(table, source="law"), task=TASK).model.vector
    module = build_module(TASK, seed=SEED)
    inputs, labels = data(Site("", index=0))[0].tensors
    optimizer = sgd(module.parameters())
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    assert_same(found, FlatModule(module).vector)


def test_more_local_steps_are_another_algorithm():
    """The laws hold for one step, and would not notice if the number of steps were ignored."""
    one = simulated({"name": "fedavg"}, steps=1, learning_rate=RATE)
    three = simulated({"name": "fedavg"}, steps=3, learning_rate=RATE)
    assert np.abs(one - three).max() > 0.05
