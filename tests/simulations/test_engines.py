"""The engines of the simulator: whoever trains the clients, the numbers are those of the loop."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import RUNS, config, convolution, data, perceptron
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fedge import RunConfig, Site, Task
from fedge.errors import ConfigError, TaskError
from fedge.run import Work
from fedge.seeds import work_seed
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer
from fedge_sim import Result, simulate
from fedge_sim.clients import Clients
from fedge_sim.engines.chosen import Origin, Wanted, chosen
from fedge_sim.engines.cohort import Cohort, Member
from fedge_sim.engines.crew import UnsuitedError
from fedge_sim.engines.model import StackedModel
from fedge_sim.population import Population
from fedge_sim.privacy import Accounts

MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 3),
    "perceptron": perceptron,
    "deep": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)
    ),
    "convolution": convolution,
}


def task_of(model: Callable[[], nn.Module], loss: Any = F.cross_entropy) -> Task:
    return Task(model=model, data=data, loss=loss)


def sets(count: int) -> list[Any]:
    return [data(Site(f"client-{at}", index=at, count=count))[0] for at in range(count)]


def both(
    task: Task, members: list[Member], work: Work
) -> tuple[np.ndarray, list[Any], np.ndarray, list[Any]]:
    model = framework.initial_model(task, seed=3).vector
    stacked, looped = (np.empty((len(members), len(model)), np.float32) for _ in range(2))
    cohort = Cohort(StackedModel(task, seed=3))
    outcomes = cohort.train(torch.from_numpy(model), members, work, torch.from_numpy(stacked))
    trainer = Trainer(task, seed=3)
    expected = [
        trainer.train(model, member.train, work, seed=member.seed, out=row)
        for member, row in zip(members, looped, strict=True)
    ]
    return stacked, outcomes, looped, expected


WORK = st.builds(
    Work,
    epochs=st.integers(1, 3),
    batch_size=st.sampled_from([1, 4, 7, 64, "full"]),
    optimizer=st.sampled_from(["sgd", "momentum", "adam"]),
    learning_rate=st.sampled_from([0.01, 0.1]),
    l1=st.sampled_from([0.0, 0.01]),
    l2=st.sampled_from([0.0, 0.1]),
    proximal=st.sampled_from([0.0, 1.0]),
)


@given(model=st.sampled_from(list(MODELS)), count=st.integers(1, 9), work=WORK, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_stack_of_ragged_clients_trains_as_the_loop_does(model: str, count: int, work: Work, seed: int):
    members = [Member(train, 100 * seed + at) for at, train in enumerate(sets(count))]
    stacked, outcomes, looped, expected = both(task_of(MODELS[model]), members, work)
    assert np.allclose(stacked, looped, rtol=2e-3, atol=2e-5)
    assert [each.num_examples for each in outcomes] == [each.num_examples for each in expected]
    for one, other in zip(outcomes, expected, strict=True):
        assert one.metrics == pytest.approx(dict(other.metrics), rel=1e-3, abs=1e-5)


@given(
    model=st.sampled_from(list(MODELS)),
    count=st.integers(1, 9),
    step=st.integers(0, 40),
    work=st.builds(
        Work,
        batch_size=st.sampled_from([1, 4, 64, "full"]),
        l1=st.sampled_from([0.0, 0.01]),
        l2=st.sampled_from([0.0, 0.1]),
        proximal=st.sampled_from([0.0, 1.0]),
    ),
)
@settings(max_examples=25, deadline=None)
def test_the_gradients_of_ragged_clients_are_those_of_the_loop(model: str, count: int, step: int, work: Work):
    task = task_of(MODELS[model])
    start = framework.initial_model(task, seed=3).vector
    members = [Member(train, 7 * at) for at, train in enumerate(sets(count))]
    stacked, looped = (np.empty((count, len(start)), np.float32) for _ in range(2))
    outcomes = Cohort(StackedModel(task, seed=3)).gradient(
        torch.from_numpy(start), members, work, torch.from_numpy(stacked), step=step
    )
    trainer = Trainer(task, seed=3)
    for member, row, outcome in zip(members, looped, outcomes, strict=True):
        alone = trainer.gradient(start, member.train, work, seed=member.seed, step=step, out=row)
        assert outcome.num_examples == alone.num_examples
        assert outcome.metrics == pytest.approx(dict(alone.metrics), rel=1e-4, abs=1e-6)
    assert np.allclose(stacked, looped, rtol=1e-3, atol=1e-5)


def test_so_many_steps_are_made_by_everybody_however_much_they_have():
    members = [Member(train, at) for at, train in enumerate(sets(6))]
    stacked, outcomes, looped, expected = both(
        task_of(MODELS["perceptron"]), members, Work(steps=5, batch_size=4)
    )
    assert np.allclose(stacked, looped, rtol=1e-3, atol=1e-5)
    assert [o.metrics["train_loss"] for o in outcomes] == pytest.approx(
        [e.metrics["train_loss"] for e in expected], rel=1e-4
    )


def test_regression_and_subsets_train_as_the_loop_does():
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    whole = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    members = [Member(Subset(whole, list(range(at, 40, 5))), at) for at in range(5)]
    task = Task(model=lambda: nn.Linear(6, 1), data=data, loss=F.mse_loss)
    stacked, _, looped, _ = both(task, members, Work(batch_size=3, learning_rate=0.05))
    assert np.allclose(stacked, looped, rtol=1e-3, atol=1e-5)


def test_what_a_client_learns_does_not_depend_on_who_is_in_the_stack():
    task, work = task_of(MODELS["perceptron"]), Work(epochs=2, batch_size=4, learning_rate=0.1)
    model, cohort = (
        torch.from_numpy(framework.initial_model(task, seed=0).vector),
        Cohort(StackedModel(task, seed=0)),
    )
    members = [Member(train, at) for at, train in enumerate(sets(7))]
    everybody, alone = torch.empty(7, len(model)), torch.empty(1, len(model))
    cohort.train(model, members, work, everybody)
    for at in (0, 3, 6):
        cohort.train(model, [members[at]], work, alone)
        assert torch.allclose(alone[0], everybody[at], rtol=1e-4, atol=1e-6)


class Tied(nn.Module):
    """One matrix, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(inputs))


class Centred(nn.Module):
    """Looks at the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs - inputs.mean(0))


class Branching(nn.Module):
    """Asks Python what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) * (2.0 if self.linear.bias.sum().item() > 0 else 1.0)


class Counting(nn.Module):
    """Has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += len(inputs)
        return self.linear(inputs)


WEIGHTS = torch.tensor([1.0, 5.0, 25.0])
UNSUITED: dict[str, tuple[Task, str]] = {
    "dropout": (task_of(lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))), "draws random numbers"),
    "buffers": (task_of(Counting), "more than parameters of its own: seen"),
    "tied": (task_of(Tied), "more than parameters"),
    "mixing": (task_of(Centred), "mixes the examples"),
    "branching": (task_of(Branching), "torch.func cannot do it"),
    "weighted classes": (
        task_of(MODELS["linear"], lambda output, target: F.cross_entropy(output, target, WEIGHTS)),
        "no mean over the examples",
    ),
    "a sum": (task_of(MODELS["linear"], lambda o, t: F.cross_entropy(o, t, reduction="sum")), "no mean over"),
}


def run(task: Task, engine: Any = "loop", **tables: Any) -> Result:
    return simulate(config(**tables), task=task, engine=engine)


@pytest.mark.parametrize("name", UNSUITED)
def test_what_cannot_be_stacked_is_left_to_the_loop_and_the_reason_is_said(
    name: str, caplog: pytest.LogCaptureFixture
):
    task, says = UNSUITED[name]
    with caplog.at_level(logging.WARNING):
        stacked = run(task, "vectorised")
    assert [record.message.count(says) for record in caplog.records if "falls_back" in record.message] == [1]
    looped = run(task)
    assert np.array_equal(stacked.model.vector, looped.model.vector)
    model = torch.from_numpy(framework.initial_model(task, seed=5).vector)
    with pytest.raises(UnsuitedError, match=says):
        Cohort(StackedModel(task, seed=5)).train(
            model, [Member(sets(3)[2], 1)], Work(batch_size=4), torch.empty(1, len(model))
        )


@pytest.mark.parametrize("tables", RUNS.values(), ids=RUNS)
def test_a_run_is_the_same_whichever_engine_drives_it(tables: dict[str, Any]):
    task = task_of(MODELS["perceptron"])
    looped, stacked = run(task, **tables), run(task, "vectorised", **tables)
    assert (stacked.status, stacked.reason) == (looped.status, looped.reason)
    assert stacked.faults == looped.faults
    for one, other in zip(stacked.history, looped.history, strict=True):
        assert (one.round, one.attempt, one.clients) == (other.round, other.attempt, other.clients)
        assert dict(one.metrics) == pytest.approx(dict(other.metrics), rel=1e-3, abs=1e-4)
    assert np.allclose(stacked.model.vector, looped.model.vector, rtol=1e-3, atol=1e-4)
    again = run(task, "vectorised", **tables)
    assert np.array_equal(again.model.vector, stacked.model.vector), "and to the bit, every time"


def test_a_client_whose_data_cannot_be_read_is_named():
    def broken(site: Site) -> Any:
        train, test = data(site)
        return ([] if site.index == 4 else train), test

    for engine in ("loop", "vectorised"):
        with pytest.raises(TaskError, match="client-4, train order of round 1"):
            run(Task(model=MODELS["linear"], data=broken, loss=F.cross_entropy), engine, cohort={"size": 8})


def test_there_is_no_engine_of_another_name():
    with pytest.raises(
        ConfigError, match="engine: expected one of auto, loop, vectorised, processes, ray, found 'warp'"
    ):
        run(task_of(MODELS["linear"]), "warp")


EXAMPLES = {"privacy": {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip": 1.0}}


@pytest.mark.parametrize(
    ("model", "rounds", "cohort", "privacy", "says"),
    [
        (MODELS["perceptron"], 64, 64, {}, ""),
        (MODELS["perceptron"], 63, 64, {}, "4032 turns of clients"),
        (lambda: nn.Linear(6, 10_000), 64, 64, {}, "a model of 70000 parameters"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), 64, 64, {}, "more than parameters"),
        (MODELS["perceptron"], 8, 64, EXAMPLES, ""),
        (MODELS["perceptron"], 7, 64, EXAMPLES, "448 turns of clients"),
    ],
    ids=["it pays", "a short run", "a large model", "buffers", "private examples", "a few private examples"],
)
def test_a_stack_is_chosen_where_it_pays_by_a_rule(
    model: Callable[[], nn.Module],
    rounds: int,
    cohort: int,
    privacy: dict[str, Any],
    says: str,
    caplog: pytest.LogCaptureFixture,
):
    table = {
        "name": "a",
        "task": "app:task",
        "rounds": rounds,
        "cohort": {"size": cohort},
        "simulation": {"clients": cohort},
    }
    config = RunConfig.from_table(table | privacy, source="run")
    task = task_of(model)
    population = Population.of(config, task, count=cohort)
    size = framework.initial_model(task, seed=0).layout.size
    with caplog.at_level(logging.WARNING):
        clients = Clients(config, task, population, Accounts(config, "train"))
        crew = chosen(
            Wanted("auto", 2), config, task, clients, kind="train", size=size, origin=Origin(own=task)
        )
    assert crew.name == ("loop" if says else "vectorised")
    assert says in crew.reasons.get("vectorised", "")
    assert not caplog.records, "nobody has asked for a stack"


def test_a_result_says_what_trained_its_clients():
    task = task_of(MODELS["perceptron"])
    assert [run(task, engine).engine for engine in ("auto", "loop", "vectorised")] == [
        "loop",
        "loop",
        "vectorised",
    ]


def examples_of_one_set() -> TensorDataset:
    return data(Site("client-9", index=9, count=10))[0]


@pytest.mark.parametrize("same", [True, False], ids=["one set", "sets of their own"])
def test_parts_of_a_set_are_found_by_whatever_indices_they_have(same: bool):
    """Negative ones count from its end, as in the loop."""
    whole = examples_of_one_set()
    indices = [[-1, 0, 3, 7], [1, 2], [5, -2, -3, 9, 11, 4]]
    members = [
        Member(Subset(whole if same else examples_of_one_set(), part), seed)
        for seed, part in enumerate(indices)
    ]
    stacked, outcomes, looped, expected = both(
        task_of(MODELS["linear"]), members, Work(epochs=2, batch_size=4)
    )
    assert np.allclose(stacked, looped, rtol=1e-4, atol=1e-6)
    assert [each.num_examples for each in outcomes] == [each.num_examples for each in expected]


def test_parts_of_one_set_are_not_copied(monkeypatch: pytest.MonkeyPatch):
    def never(tensors: Any) -> torch.Tensor:
        raise AssertionError("the rows of one tensor were brought together")

    whole = examples_of_one_set()
    members = [Member(Subset(whole, part), 1) for part in ([1, 2, 3], [4, 5])]
    out = torch.empty(2, 21)
    model = torch.from_numpy(framework.initial_model(task_of(MODELS["linear"]), seed=3).vector)
    cohort = Cohort(StackedModel(task_of(MODELS["linear"]), seed=3))
    monkeypatch.setattr(torch, "cat", never)
    cohort.train(model, members, Work(batch_size=2), out)


def test_data_that_the_tasks_loss_does_not_take_is_named_though_a_step_was_traced_before():
    def late(site: Site) -> tuple[TensorDataset, TensorDataset]:
        train, test = data(site)
        inputs, labels = train.tensors
        return TensorDataset(inputs, labels + 7 * (site.index == 7)), test

    task = Task(model=MODELS["linear"], data=late, loss=F.cross_entropy)
    for engine in ("loop", "vectorised"):
        found = run(task, engine, cohort={"size": 2}, rounds=40)
        assert found.status == "failed"
        assert re.match(r"client-7, train order of round .*loss", found.reason)
        assert 0 < len(found.history) < 40, "the rounds before are kept"


def test_a_simulation_that_runs_out_of_memory_keeps_its_rounds_and_says_so(monkeypatch: pytest.MonkeyPatch):
    real: Any = Trainer.train

    def train(self: Trainer, *arguments: Any, seed: int, **named: Any) -> Any:
        if seed == work_seed(5, site="client-3", kind="train", round=3):
            raise MemoryError
        return real(self, *arguments, seed=seed, **named)

    monkeypatch.setattr(Trainer, "train", train)
    found = run(task_of(MODELS["linear"]), cohort={"size": 8})
    assert found.status == "failed"
    assert found.reason.startswith("the simulation is out of memory")
    assert len(found.history) == 2
