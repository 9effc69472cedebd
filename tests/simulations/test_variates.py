"""Control variates of simulated clients: kept as a site keeps them, wherever there is room, in every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import SCAFFOLD, STEPS, config, convolution, data, perceptron
from torch import nn
from torch.utils.data import TensorDataset

from fedge import Site, Task
from fedge.errors import ConfigError, RunError
from fedge.events import OrderId
from fedge.run import Work
from fedge.task import OwnTask
from fedge.variates import renewed
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer
from fedge_sim import Result, simulate, variates
from fedge_sim.engines.cohort import Cohort, Member
from fedge_sim.engines.model import StackedModel
from fedge_sim.variates import Rows, Variates

WORK = Work(steps=2, learning_rate=0.5)
CONTROL = np.array([1.0, 2.0], np.float32)


def order(round: int, attempt: int = 1) -> OrderId:
    return OrderId("train", round, attempt)


def update(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(3, value, np.float32)  # with a buffer at its end


def test_a_client_is_corrected_by_the_servers_variate_less_its_own_of_the_rounds_that_were_committed():
    kept = Variates(CONTROL, WORK)
    assert kept.of("a", order(1)) is CONTROL, "who has not taken part has zeros"
    kept.take("a", order(1), update(3.0))
    kept.take("b", order(1), update(3.0))
    assert kept.of("a", order(1, 2)) is CONTROL, "another attempt at a round begins as the first one did"
    kept.take("a", order(1, 2), update(1.0))
    own = renewed(CONTROL, update(1.0), WORK)
    assert own.tolist() == [-2.0, -3.0]
    kept.commit(order(1, 2), ["a"], 2 * CONTROL)
    assert found(kept, "a", order(2)) == (2 * CONTROL - own).tolist()
    assert found(kept, "b", order(2)) == (2 * CONTROL).tolist(), "its update is in no model"
    assert kept.of("a", OrderId("evaluate", 2, 1)) is None
    kept.take("a", order(2), update(5.0))
    kept.commit(order(2), [], 2 * CONTROL)
    kept.take("a", order(3), update(5.0))
    kept.take("b", order(3), update(5.0))
    kept.commit(order(3), ["b"], CONTROL)
    assert found(kept, "a", order(4)) == (CONTROL - own).tolist(), (
        "a round was skipped, another has left it out"
    )


def found(kept: Variates, client: str, order: OrderId) -> list[float]:
    correction = kept.of(client, order)
    assert correction is not None
    return [float(each) for each in correction]


def test_without_a_control_variate_nobody_has_one():
    kept = Variates(None, WORK)
    kept.take("a", order(1), update(3.0))
    kept.commit(order(1), ["a"], None)
    assert kept.of("a", order(2)) is None
    with pytest.raises(RunError, match="from its first round on"):
        kept.commit(order(2), ["a"], CONTROL)
    assert kept.nbytes == 0


@given(
    turns=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("-cr")), max_size=40),
    held=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_what_does_not_fit_in_memory_is_read_back_as_it_was(turns: Sequence[tuple[str, str]], held: int):
    """A client's update, and what happens then: nothing, the round is committed, or it is tried again."""
    roomy, cramped = Variates(CONTROL, WORK), Variates(CONTROL, WORK, most_bytes=held * CONTROL.nbytes)
    round, attempt = 1, 1
    for number, (client, then) in enumerate(turns):
        for each in (roomy, cramped):
            each.take(client, order(round, attempt), update(number))
            if then == "c":
                each.commit(order(round, attempt), "abcdef", CONTROL + number)
        round, attempt = (round + 1, 1) if then == "c" else (round, attempt + (then == "r"))
    for client in "abcdef":
        assert found(roomy, client, order(round)) == found(cramped, client, order(round))
    cramped.close()


def test_room_is_used_again():
    """One for each of ten clients, and one for each who takes part in a round before it is over."""
    kept = Variates(CONTROL, WORK)
    for round in range(1, 50):
        for attempt in (1, 2):
            for at in range(5):
                kept.take(f"client-{(round + at) % 10}", order(round, attempt), update(round))
        kept.commit(order(round, 2), [f"client-{at}" for at in range(10)], CONTROL)
    assert max(kept._kept._own.values()) < 20


def test_a_disk_that_is_full_is_said(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    rows = Rows(2, most_bytes=0)
    with pytest.raises(RunError, match=r"No space left on device.*set TMPDIR"):
        rows.write(rows.take(), CONTROL)


def line(site: Site) -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(site.index or 0)
    inputs = torch.randn(12, 3, generator=generator) * (1 + (site.index or 0))
    wanted = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + float(site.index or 0)
    return TensorDataset(inputs, wanted), TensorDataset(inputs[:2], wanted[:2])


LINES = Task(model=lambda: nn.Linear(3, 1), data=line, loss=F.mse_loss)


def printed(result: Result, steps: int, rate: float, count: int) -> Any:
    """Karimireddy et al. 2020, Algorithm 1, option II, in float64 on the same cohorts: weights and bias."""
    sets = [line(Site(f"client-{at}", index=at, count=count))[0].tensors for at in range(count)]
    inputs = [np.column_stack([each.double().numpy(), np.ones(len(each))]) for each, _ in sets]
    targets = [each.double().numpy()[:, 0] for _, each in sets]

    def gradient(at: int, w: Any) -> Any:
        return 2 * inputs[at].T @ (inputs[at] @ w - targets[at]) / len(targets[at])

    x = framework.initial_model(LINES, seed=5).vector.astype(np.float64)
    c, own = np.zeros(4), [np.zeros(4) for _ in range(count)]
    for row in result.history:
        moves, changes = [], []
        for at in (int(name.partition("-")[2]) for name in row.clients):
            y = x.copy()
            for _ in range(steps):
                y -= rate * (gradient(at, y) - own[at] + c)
            new = own[at] - c + (x - y) / (steps * rate)
            moves.append(y - x)
            changes.append(new - own[at])
            own[at] = new
        x = x + np.mean(moves, axis=0)
        c = c + len(moves) / count * np.mean(changes, axis=0)
    return x


TABLES: dict[str, Any] = {
    "rounds": 12,
    "work": {"steps": 4, "batch_size": "full", "learning_rate": 0.005},
    "strategy": {"name": "scaffold", "clients": 5, "weighting": "uniform"},
    "cohort": {"size": 3},
    "simulation": {"clients": 5},
}


@pytest.mark.parametrize("engine", ["loop", "vectorised", "processes"])
def test_a_simulated_run_is_the_algorithm_as_it_is_printed(engine: Any):
    found = simulate(config(**TABLES), task=LINES, engine=engine)
    assert len(found.history) == 12
    assert np.allclose(found.model.vector, printed(found, 4, 0.005, 5), rtol=1e-4, atol=1e-4)


def test_variates_on_disk_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    held = simulate(config(**TABLES), task=LINES, engine="loop")
    monkeypatch.setattr(Variates.__init__, "__kwdefaults__", {"bound": None, "most_bytes": 0})
    assert variates.Variates(CONTROL, WORK)._kept._rows._most == 0
    spilled = simulate(config(**TABLES), task=LINES, engine="loop")
    assert np.array_equal(held.model.vector, spilled.model.vector)


def test_a_control_variate_goes_down_with_each_training_order_and_nothing_more_comes_up():
    tables = {**TABLES, "evaluation": {"every": 0}}
    with_them = simulate(config(**tables), task=LINES).history[0]
    without = simulate(config(**{**tables, "strategy": {"name": "fedavg"}}), task=LINES).history[0]
    assert with_them.bytes_down == 2 * without.bytes_down
    assert with_them.bytes_up == without.bytes_up


def test_a_task_that_trains_by_itself_cannot_be_corrected():
    own = OwnTask(lambda seed: framework.initial_model(LINES, seed=seed), lambda site, work: None)  # type: ignore[arg-type,return-value]  # nobody is asked
    with pytest.raises(
        ConfigError, match="strategy scaffold: expected a task whose gradients control variates can"
    ):
        simulate(config(**TABLES), task=own)


def test_a_simulation_knows_how_many_clients_there_are():
    with pytest.raises(
        ConfigError, match=r"strategy\.clients: expected the 7 clients of the simulation, found 5"
    ):
        simulate(config(**TABLES), task=LINES, clients=7)


MODELS = {"perceptron": perceptron, "convolution": convolution, "linear": lambda: nn.Linear(6, 3)}


@given(
    model=st.sampled_from(list(MODELS)),
    count=st.integers(1, 7),
    steps=st.integers(1, 5),
    batch=st.sampled_from([1, 4, "full"]),
    proximal=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_a_stack_of_corrected_clients_trains_as_the_loop_does(
    model: str, count: int, steps: int, batch: Any, proximal: float, seed: int
):
    task = Task(model=MODELS[model], data=data, loss=F.cross_entropy)
    work = Work(steps=steps, batch_size=batch, learning_rate=0.1, proximal=proximal)
    start = framework.initial_model(task, seed=3).vector
    random = np.random.default_rng(seed)
    corrections = random.normal(size=(count, len(start))).astype(np.float32)
    sets = [data(Site(f"client-{at}", index=at, count=count))[0] for at in range(count)]
    stacked, looped = np.empty_like(corrections), np.empty_like(corrections)
    members = [
        Member(train, seed + at, correction=torch.from_numpy(row))
        for at, (train, row) in enumerate(zip(sets, corrections, strict=True))
    ]
    Cohort(StackedModel(task, seed=3)).train(
        torch.from_numpy(start), members, work, torch.from_numpy(stacked)
    )
    trainer = Trainer(task, seed=3)
    for at, (train, row) in enumerate(zip(sets, corrections, strict=True)):
        trainer.train(start, train, work, seed=seed + at, out=looped[at], correction=row)
    assert np.allclose(stacked, looped, rtol=2e-3, atol=2e-5)


def test_one_step_with_a_correction_is_one_step_of_the_gradient_and_the_correction():
    task = Task(model=perceptron, data=data, loss=F.cross_entropy)
    start = framework.initial_model(task, seed=3).vector
    train = data(Site("client-2", index=2, count=3))[0]
    work, trainer = Work(steps=1, batch_size="full", learning_rate=0.25), Trainer(task, seed=3)
    plain, corrected, gradient = (np.empty_like(start) for _ in range(3))
    correction = np.linspace(-1, 1, len(start), dtype=np.float32)
    trainer.train(start, train, work, seed=1, out=plain)
    trainer.train(start, train, work, seed=1, out=corrected, correction=correction)
    trainer.gradient(start, train, work, seed=1, step=0, out=gradient)
    assert np.allclose(plain, -0.25 * gradient, atol=1e-6)
    assert np.allclose(corrected, plain - 0.25 * correction, atol=1e-6)


def test_a_run_in_which_it_pays_gets_further_than_federated_averaging():
    """Each client's best is another, and their own steps lead there."""
    tables = {**TABLES, "rounds": 60, "cohort": {"size": 5}}
    best = np.linalg.lstsq(*_pooled(5), rcond=None)[0]
    far = {}
    for name in ("scaffold", "fedavg"):
        strategy = {"name": name, "weighting": "uniform"} | ({"clients": 5} if name == "scaffold" else {})
        work = {"steps": 20, "batch_size": "full", "learning_rate": 0.005}
        found = simulate(config(**{**tables, "strategy": strategy, "work": work}), task=LINES, engine="loop")
        far[name] = float(np.linalg.norm(found.model.vector - best))
    assert far["scaffold"] < 0.1 * far["fedavg"]


def _pooled(count: int) -> tuple[Any, Any]:
    sets = [line(Site(f"client-{at}", index=at, count=count))[0].tensors for at in range(count)]
    inputs = np.concatenate([np.column_stack([each.numpy(), np.ones(len(each))]) for each, _ in sets])
    return inputs, np.concatenate([each.numpy()[:, 0] for _, each in sets])


HARD: dict[str, dict[str, Any]] = {
    "faults": {
        "cohort": {"size": 6, "quorum": 3, "over_select": 1.3, "attempts": 20},
        "simulation": {
            "clients": 8,
            "faults": {
                "dropout": 0.1,
                "failure": 0.1,
                "straggler": 0.1,
                "corruption": 0.1,
                "crash_every": 17,
            },
        },
    },
    "secure sums that cut": {"secure_aggregation": {"enabled": True, "bound": 0.02}},
    "clipped": {"privacy": {"unit": "none", "clip": 0.05}},
    "private examples": {"privacy": {"unit": "example", "epsilon": 50.0, "delta": 1e-3, "clip": 1.0}},
    "everybody": {"cohort": {"size": 8}},
}


@pytest.mark.parametrize("tables", HARD.values(), ids=HARD)
def test_the_servers_variate_is_the_mean_of_the_clients_whatever_happens(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    commit, seen = Variates.commit, []

    def looked_at(self: Variates, order: OrderId, clients: Any, control: Any) -> None:
        commit(self, order, clients, control)
        own = [self._kept.kept(name) for name in self._kept._own]
        seen.append((control, np.sum(own, axis=0) / 8))

    monkeypatch.setattr(Variates, "commit", looked_at)
    found = simulate(
        config(strategy=SCAFFOLD, work=STEPS, rounds=8, **tables), task=LINES_OF_SIX, engine="loop"
    )
    assert found.status == "done"
    assert len(seen) == 8
    for control, mean in seen:
        assert np.abs(control).max() > 0.01
        assert np.allclose(control, mean, atol=2e-4)


def test_a_crash_of_the_coordinator_changes_no_bit():
    whole = simulate(config(strategy=SCAFFOLD, work=STEPS), task=LINES_OF_SIX, engine="loop")
    faults = {"clients": 8, "faults": {"crash_every": 5}}
    crashed = simulate(
        config(strategy=SCAFFOLD, work=STEPS, simulation=faults), task=LINES_OF_SIX, engine="loop"
    )
    assert crashed.faults.crashes > 0
    assert np.array_equal(whole.model.vector, crashed.model.vector)


LINES_OF_SIX = Task(model=perceptron, data=data, loss=F.cross_entropy)
