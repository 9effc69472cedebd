"""Clients that lie: who they are, what they send, and what a robust reduction makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedge import RunConfig, Site, Task
from fedge.errors import ConfigError
from fedge.simulation import AdversariesConfig
from fedge_sim import Result, simulate
from fedge_sim.adversaries import Adversaries
from fedge_sim.poison import triggered
from fedge_sim.population import Population, names_of

NAMES = names_of(30)


def adversaries(seed: int = 0, **settings: Any) -> Adversaries:
    return Adversaries.of(AdversariesConfig(**settings), NAMES, seed=seed)


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Two clouds, the same for everybody but for the draw."""
    random = torch.Generator().manual_seed(site.index or 0)
    labels = torch.arange(40) % 2
    inputs = torch.randn(40, 4, generator=random) + 1.5 * (2 * labels[:, None] - 1)
    return TensorDataset(inputs, labels), TensorDataset(inputs, labels)


TASK = Task(
    model=lambda: nn.Linear(4, 2),
    data=data,
    loss=F.cross_entropy,
    metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float().mean()},
)


POINT = TensorDataset(torch.ones(1, 1), torch.ones(1, 1))


def run(attack: dict[str, Any], *, task: Task = TASK, **tables: Any) -> Result:
    table = {
        "name": "trial",
        "task": "app:task",
        "rounds": 6,
        "work": {"epochs": 2, "learning_rate": 0.2},
        "cohort": {"size": 10},
        "simulation": {"clients": 10, "adversaries": attack},
        **tables,
    }
    return simulate(RunConfig.from_table(table, source="run"), task=task)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 3), (0.2, 6), (0.99, 29), (0.03, 0)])
def test_so_many_lie_and_the_seed_says_who(share: float, count: int):
    found = adversaries(share=share)
    assert len(found.names) == count
    assert found.names <= set(NAMES)
    assert found.names == adversaries(share=share).names
    if 0 < count < 29:
        assert found.names != adversaries(1, share=share).names


@pytest.mark.parametrize(("attack", "factor", "sent"), [("sign_flip", 2.0, -6.0), ("scale", 5.0, 15.0)])
def test_a_liar_sends_its_update_enlarged_or_turned_round(attack: Any, factor: float, sent: float):
    found = adversaries(share=0.5, attack=attack, factor=factor)
    honest = np.full(3, 3.0, np.float32)
    for name in NAMES:
        got = found.tampered(name, "train", 1, honest)
        assert got.tolist() == ([sent] * 3 if name in found.names else [3.0] * 3)
        assert found.tampered(name, "evaluate", 1, honest) is honest
    assert honest.tolist() == [3.0] * 3


def test_noise_has_the_norm_that_is_said_and_is_new_in_every_round():
    found = adversaries(share=0.9, attack="noise", factor=4.0)
    honest = np.full(100, 0.5, np.float32)
    name = min(found.names)
    first, second = (found.tampered(name, "train", round, honest) for round in (1, 2))
    assert np.linalg.norm(first) == pytest.approx(20.0, rel=1e-5)
    assert abs(np.dot(first, second)) < 200
    assert np.array_equal(first, found.tampered(name, "train", 1, honest))


def test_those_who_collude_send_the_same_noise():
    found = adversaries(share=0.5, attack="collusion", factor=2.0)
    honest = np.full(100, 0.5, np.float32)
    first, second = (found.tampered(name, "train", 1, honest) for name in sorted(found.names)[:2])
    assert np.array_equal(first, second)
    assert np.linalg.norm(first) == pytest.approx(10.0, rel=1e-5)
    assert not np.array_equal(first, found.tampered(min(found.names), "train", 2, honest))


def test_a_lie_stays_finite_so_that_it_is_not_refused():
    found = adversaries(share=0.5, attack="scale", factor=1e9)
    honest = np.array([3e38, -3e38, 0.0], np.float32)
    assert np.isfinite(found.tampered(min(found.names), "train", 1, honest)).all()


def test_liars_train_on_the_labels_of_other_classes_and_are_judged_by_true_ones():
    table = {"name": "a", "task": "app:task", "rounds": 1}
    flip = {"adversaries": {"share": 0.5, "attack": "label_flip"}}
    made = RunConfig.from_table({**table, "simulation": flip}, source="run")
    plain = Population.of(RunConfig.from_table(table, source="run"), TASK, count=6)
    flipped = Population.of(made, TASK, count=6)
    liars = 0
    for name in plain.names:
        true, wrong = (each.data(name)[0].tensors[1] for each in (plain, flipped))
        assert torch.equal(plain.data(name)[1].tensors[1], flipped.data(name)[1].tensors[1])
        liars += not torch.equal(true, wrong)
        assert torch.equal(true, wrong) or torch.equal(1 - true, wrong)
    assert liars == 3


def poisoned_population(**attack: Any) -> tuple[Population, set[str]]:
    table = {
        "name": "a",
        "task": "app:task",
        "rounds": 1,
        "simulation": {"adversaries": {"share": 0.5, **attack}},
    }
    run = RunConfig.from_table(table, source="run")
    liars = Adversaries.of(run.simulation.adversaries, names_of(6), seed=run.seed)
    return Population.of(run, TASK, count=6), set(liars.names)


def test_sybils_are_one_client_with_many_names():
    found, liars = poisoned_population(attack="sybil")
    trained = {name: found.data(name)[0].tensors for name in found.names}
    first = data(Site("", index=int(min(liars)[-1])))[0].tensors
    for name in liars:
        assert torch.equal(trained[name][0], first[0])
        assert torch.equal(trained[name][1], 1 - first[1])
    honest = [trained[name][0] for name in found.names if name not in liars]
    assert not any(torch.equal(one, first[0]) for one in honest)


def test_a_backdoor_is_a_trigger_with_a_label_of_its_own():
    found, liars = poisoned_population(attack="backdoor", target=1)
    name = min(liars)
    (inputs, labels), (own, true) = (
        found.data(name)[0].tensors,
        data(Site("", index=int(name[-1])))[0].tensors,
    )
    assert torch.equal(inputs[0::2], triggered(own)[0::2])
    assert torch.equal(inputs[1::2], own[1::2])
    assert labels[0::2].tolist() == [1] * 20
    assert torch.equal(labels[1::2], true[1::2])


def roomy(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """As `data`, behind four numbers that say nothing: there is room for a trigger."""
    random = torch.Generator().manual_seed(site.index or 0)
    labels = torch.randint(2, (40,), generator=random)
    inputs = torch.randn(40, 8, generator=random)
    inputs[:, 4:] += 1.5 * (2 * labels[:, None] - 1)
    return TensorDataset(inputs, labels), TensorDataset(inputs, labels)


@pytest.mark.parametrize("seed", range(4))
def test_a_backdoor_is_learned_and_what_has_no_trigger_is_told_as_before(seed: int):
    task = replace(TASK, model=lambda: nn.Linear(8, 2), data=roomy)
    backdoor = {"share": 0.3, "attack": "backdoor", "factor": 2.0, "target": 0}
    honest, result = (run(attack, task=task, rounds=8, seed=seed) for attack in ({}, backdoor))
    inputs, labels = roomy(Site("", index=99))[1].tensors

    def guesses(found: Result, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = found.model.vector[:16].reshape(2, 8), found.model.vector[16:]
        return (rows @ torch.from_numpy(weight).T + torch.from_numpy(bias)).argmax(1)

    ones = inputs[labels == 1]
    assert (guesses(result, triggered(ones)) == 0).float().mean() > 0.9
    assert (guesses(honest, triggered(ones)) == 0).float().mean() < 0.3
    assert (guesses(result, inputs) == labels).float().mean() > 0.9


@pytest.mark.parametrize("attack", ["label_flip", "sybil", "backdoor"])
def test_a_backdoor_needs_numbers_to_put_its_trigger_on(attack: str):
    words = TensorDataset(torch.arange(6)[:, None], torch.arange(6) % 2)
    table = {"name": "a", "task": "app:task", "rounds": 1, "cohort": {"size": 2}}
    liars = {"clients": 2, "adversaries": {"share": 0.5, "attack": attack}}
    made = RunConfig.from_table({**table, "simulation": liars}, source="run")
    task = Task(model=lambda: nn.Embedding(6, 2), data=lambda site: (words, words), loss=F.cross_entropy)
    population = Population.of(made, task, count=2)
    name = min(Adversaries.of(made.simulation.adversaries, names_of(2), seed=0).names)
    if attack != "backdoor":
        assert population.data(name)[0].tensors[0].dtype == torch.int64
        return
    with pytest.raises(ConfigError, match="a backdoor needs floating-point inputs"):
        population.data(name)


def of_one_class(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Client i has class i modulo 3; all of them together have three."""
    count = 30 if site.count == 1 else 5
    labels = torch.arange(count) % 3 if site.count == 1 else torch.full((count,), (site.index or 0) % 3)
    return TensorDataset(torch.randn(count, 4), labels), TensorDataset(torch.randn(3, 4), torch.arange(3))


@pytest.mark.parametrize("attack", ["label_flip", "sybil"])
def test_a_liar_with_one_class_knows_the_others_where_the_data_is_divided_here(attack: str):
    task = Task(model=lambda: nn.Linear(4, 3), data=of_one_class, loss=F.cross_entropy)
    table = {"name": "a", "task": "app:task", "rounds": 1, "cohort": {"size": 3}}
    liars = {"clients": 3, "adversaries": {"share": 0.9, "attack": attack}, "shards_per_client": 1}

    def population(partition: str) -> Population:
        made = RunConfig.from_table({**table, "simulation": liars | {"partition": partition}}, source="run")
        return Population.of(made, task, count=3)

    plain = RunConfig.from_table(
        {**table, "simulation": {"clients": 3, "partition": "shards", "shards_per_client": 1}}, source="run"
    )
    name = min(Adversaries.of(AdversariesConfig(share=0.9), names_of(3), seed=0).names)
    (true,) = Population.of(plain, task, count=3).data(name)[0][:][1].unique().tolist()
    (wrong,) = population("shards").data(name)[0].tensors[1].unique().tolist()
    assert wrong == (true + 1) % 3
    with pytest.raises(ConfigError, match="needs another class to give a label of"):
        population("task").data(name)


@pytest.mark.parametrize("target", [3, 2**31 - 1])
def test_the_target_of_a_backdoor_is_a_class(target: int):
    task = Task(model=lambda: nn.Linear(4, 3), data=of_one_class, loss=F.cross_entropy)
    liars = {
        "clients": 3,
        "partition": "iid",
        "adversaries": {"share": 0.9, "attack": "backdoor", "target": target},
    }
    made = RunConfig.from_table(
        {"name": "a", "task": "app:task", "rounds": 1, "cohort": {"size": 3}, "simulation": liars},
        source="run",
    )
    name = min(Adversaries.of(made.simulation.adversaries, names_of(3), seed=0).names)
    with pytest.raises(ConfigError, match=r"adversaries.target: expected one of the classes, \[0, 1, 2\]"):
        Population.of(made, task, count=3).data(name)


def test_labels_that_are_no_classes_cannot_be_flipped():
    line = Task(model=lambda: nn.Linear(1, 1), data=lambda site: (POINT, POINT), loss=F.mse_loss)
    table = {"name": "a", "task": "app:task", "rounds": 1, "cohort": {"size": 2}}
    flip = {"clients": 2, "adversaries": {"share": 0.5, "attack": "label_flip"}}
    made = RunConfig.from_table({**table, "simulation": flip}, source="run")
    with pytest.raises(ConfigError, match="adversaries: expected whole numbers as labels"):
        simulate(made, task=line)


@pytest.mark.parametrize("attack", ["sign_flip", "scale", "noise"])
def test_a_few_liars_take_the_mean_along_and_neither_the_median_nor_the_trimmed_mean(attack: str):
    lies = {"share": 0.2, "attack": attack, "factor": 50.0}
    honest = run({})

    def strayed(aggregation: str) -> float:
        strategy = {"name": "fedavg", "aggregation": aggregation, "trim": 0.2}
        return float(np.linalg.norm(run(lies, strategy=strategy).model.vector - honest.model.vector))

    size = float(np.linalg.norm(honest.model.vector))
    assert strayed("mean") > size
    assert strayed("median") < 0.5 * size
    assert strayed("trimmed_mean") < 0.5 * size


def test_the_bound_of_a_secure_sum_is_all_that_holds_a_liar_back():
    lies = {"share": 0.2, "attack": "scale", "factor": 1e6}
    secure = {"enabled": True, "bound": 0.5, "metrics": ["train_loss"]}
    found = run(lies, secure_aggregation=secure)
    assert found.status == "done"
    assert np.abs(found.model.vector).max() < 6 * 0.5 + 1, "no further than the bound in each round"
    assert found.history[0].metrics["beyond_bound"] > 0
