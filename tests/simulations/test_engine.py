"""The plain engine: reproducible to the bit, robust to what a client does, and equal to a loop by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedge import RunConfig, Site, Task
from fedge.errors import ConfigError, TaskError
from fedge.history import Row
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module
from fedge_sim import Result, simulate

BAD_CLIENT = 1


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """Unequal sizes: client i has 10 + 4 i examples to train on."""
    assert site.index is not None
    random = torch.Generator().manual_seed(site.index)
    size = 10 + 4 * site.index
    inputs = torch.randn(size + 5, 4, generator=random)
    labels = inputs[:, :3].argmax(1)
    return TensorDataset(inputs[:size], labels[:size]), TensorDataset(inputs[size:], labels[size:])


def one_bad(site: Site) -> tuple[TensorDataset, TensorDataset]:
    train, test = data(site)
    if site.index == BAD_CLIENT:
        train.tensors[0][0, 0] = float("inf")
    return train, test


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


TASK = Task(model=model, data=data, loss=F.cross_entropy, metrics={"accuracy": accuracy})


def config(rounds: int = 3, clients: int = 4, **tables: Any) -> RunConfig:
    table = {
        "name": "trial",
        "task": "app:task",
        "rounds": rounds,
        "seed": 3,
        "work": {"batch_size": 8, "learning_rate": 0.2},
        "cohort": {"size": clients},
        "simulation": {"clients": clients},
        **tables,
    }
    return RunConfig.from_table(table, source="run.toml")


def bits(result: Result) -> bytes:
    return result.model.vector.tobytes()


def timeless(result: Result) -> list[Row]:
    return [replace(row, seconds=0.0) for row in result.history]


# Reproducible.


@pytest.mark.parametrize("strategy", ["fedavg", "mirrored_sgd", "sgd"])
def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(strategy: str):
    run = config(strategy={"name": strategy})
    torch.manual_seed(1)
    first = simulate(run, task=TASK)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = simulate(run, task=TASK)
    assert bits(first) == bits(second)
    assert timeless(first) == timeless(second)
    assert first.status == second.status == "done"
    assert torch.equal(torch.get_rng_state(), state), "and nobody else's randomness is touched"


def test_another_seed_gives_another_model_and_another_cohort():
    run = config(cohort={"size": 2})
    one, other = simulate(run, task=TASK), simulate(run, task=TASK, seed=4)
    assert bits(one) != bits(other)
    assert [row.clients for row in one.history] != [row.clients for row in other.history]
    assert other.run.seed == 4
    assert bits(other) == bits(simulate(config(cohort={"size": 2}, seed=4), task=TASK))


# Equal to what one would write.


def by_hand(rounds: int, clients: Sequence[int], *, epochs: int, rate: float) -> nn.Module:
    """Federated averaging of state dicts: McMahan et al. 2017, Algorithm 1, with full batches."""
    server = build_module(TASK, seed=3)
    for _ in range(rounds):
        total, average = 0, {name: torch.zeros_like(p) for name, p in server.state_dict().items()}
        for index in clients:
            local = copy.deepcopy(server)
            inputs, labels = data(Site("", index=index))[0].tensors
            for _ in range(epochs):
                local.zero_grad()
                F.cross_entropy(local(inputs), labels).backward()
                with torch.no_grad():
                    for parameter in local.parameters():
                        parameter -= rate * parameter.grad
            total += len(labels)
            for name, parameter in local.state_dict().items():
                average[name] += len(labels) * parameter
        server.load_state_dict({name: value / total for name, value in average.items()})
    return server


def test_simulated_fedavg_is_a_loop_over_clients_written_by_hand():
    work = {"epochs": 3, "batch_size": "full", "learning_rate": 0.3}
    result = simulate(config(5, work=work), task=TASK)
    expected = by_hand(5, range(4), epochs=3, rate=0.3)
    np.testing.assert_allclose(result.model.vector, FlatModule(expected).vector, rtol=1e-4, atol=1e-5)
    start = FlatModule(build_module(TASK, seed=3)).vector
    assert np.abs(result.model.vector - start).max() > 0.1
    assert result.history[-1].num_examples == 10 + 14 + 18 + 22


def test_metrics_are_the_clients_own_weighted_by_their_examples():
    result = simulate(config(1), task=TASK)
    flat = FlatModule(build_module(TASK, seed=3))
    flat.load(result.model.vector)
    found = []
    for index in range(4):
        inputs, labels = data(Site("", index=index))[1].tensors
        found.append(F.cross_entropy(flat.module(inputs), labels).item())
    assert result.history[0].metrics["loss"] == pytest.approx(np.mean(found), rel=1e-5)
    assert result.metrics == result.history[0].metrics
    assert set(result.metrics) == {"train_loss", "loss", "accuracy"}


# What is told and recorded.


def test_each_round_is_told_and_an_evaluated_one_again_with_its_metrics():
    told: list[Row] = []
    result = simulate(config(5, evaluation={"every": 2}), task=TASK, callbacks=[told.append])
    assert [row.round for row in told] == [1, 2, 2, 3, 4, 4, 5, 5], "and the last is always evaluated"
    assert ["loss" in row.metrics for row in result.history] == [False, True, False, True, True]
    assert {row.round: row for row in told} == {row.round: row for row in result.history}
    assert all("train_loss" in row.metrics for row in result.history)


def test_numbers_given_take_the_place_of_the_runs_own():
    run = config(evaluation={"every": 0}, cohort={"size": 2})
    result = simulate(run, task=TASK, clients=6, rounds=2, seed=9)
    assert (result.clients, len(result.history), result.run.seed) == (6, 2, 9)
    assert (result.run.simulation.clients, result.run.rounds) == (6, 2)
    assert run.rounds == 3, "the run itself is as it was"
    assert result.summary()["clients"] == 6


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"clients": 3}, "simulation.clients: expected at least the 4 clients that a round needs .* found 3"),
        ({"clients": 0}, "simulation.clients: input should be greater than or equal to 1"),
        ({"rounds": 0}, "rounds: input should be greater than or equal to 1"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_like_the_runs_own(numbers: dict[str, int], says: str):
    with pytest.raises(ConfigError, match=says):
        simulate(config(), task=TASK, **numbers)


def test_too_few_clients_for_the_turns_that_privacy_leaves_to_each_are_refused_and_enough_share_them():
    privacy = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0, "max_participations": 2}
    run = config(6, evaluation={"every": 0}, cohort={"size": 2}, privacy=privacy)
    with pytest.raises(ConfigError, match=r"at least 6 clients for 6 rounds of 2 .*found 5"):
        simulate(run, task=TASK, clients=5)
    result = simulate(run, task=TASK, clients=6)
    turns = Counter(client for row in result.history for client in row.clients)
    assert (result.status, set(turns.values())) == ("done", {2})


def test_a_run_may_be_the_path_of_its_file_with_the_task_beside_it(tmp_path: Path):
    (tmp_path / "trial_engine_app.py").write_text(f"from {__name__} import TASK as task\n")
    (tmp_path / "run.toml").write_text(
        'name = "trial"\ntask = "trial_engine_app:task"\nrounds = 3\nseed = 3\n'
        "[work]\nbatch_size = 8\nlearning_rate = 0.2\n[cohort]\nsize = 4\n[simulation]\nclients = 4\n"
    )
    result = simulate(str(tmp_path / "run.toml"))
    assert bits(result) == bits(simulate(config(), task=TASK))


def test_an_interrupted_run_ends_with_what_it_has_committed():
    def interrupt(row: Row) -> None:
        if row.round == 2:
            raise KeyboardInterrupt

    run = config(9, evaluation={"every": 0})
    result = simulate(run, task=TASK, callbacks=[interrupt])
    assert (result.status, result.reason) == ("stopped", "stopped by its owner")
    assert [row.round for row in result.history] == [1, 2]
    assert bits(result) == bits(simulate(run, task=TASK, rounds=2))


def test_an_error_in_the_tasks_code_names_the_client_and_the_order():
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if len(target) == 6:  # the last batches of clients 1 and 3 have 14 - 8 and 22 - 16 examples
            raise RuntimeError("device on fire")
        return F.cross_entropy(output, target)

    with pytest.raises(
        TaskError, match=r"client-[13], train order of round 1: .*RuntimeError: device on fire"
    ):
        simulate(config(), task=replace(TASK, loss=loss), engine="loop")


# What a client does costs that client's part.


def test_a_client_that_diverges_is_kept_in_by_its_gate_and_costs_only_its_part():
    run = config(3, clients=4, cohort={"size": 4, "quorum": 3})
    result = simulate(run, task=replace(TASK, data=one_bad))
    assert result.status == "done"
    for row in result.history:
        assert row.clients == ("client-0", "client-2", "client-3")
        assert row.refused == 1
    assert np.isfinite(result.model.vector).all()


def test_without_a_quorum_the_run_fails_and_says_what_the_last_client_said():
    run = config(3, cohort={"size": 4, "attempts": 2})
    result = simulate(run, task=replace(TASK, data=one_bad))
    assert result.status == "failed"
    assert result.reason.startswith("round 1: 3 of at least 4 updates, 1 clients failed")
    assert (
        "not_finite: training made an update with NaN or infinity: lower the learning rate" in result.reason
    )
    assert result.history == ()
    assert bits(result) == FlatModule(build_module(TASK, seed=3)).vector.tobytes()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_model_that_is_not_finite_fails_the_run_at_its_last_good_round():
    # A vanishing client rate under a vast server rate: each update is finite, their step is not.
    tables = {"strategy": {"name": "fedavg", "server_learning_rate": 1e38}, "evaluation": {"every": 0}}
    result = simulate(config(**tables, work={"learning_rate": 1e3}), task=TASK)
    assert result.status == "failed"
    assert "NaN or infinity" in result.reason
    assert np.isfinite(result.model.vector).all()


def test_more_are_asked_than_are_needed_and_the_others_called_off():
    run = config(4, clients=10, cohort={"size": 4, "over_select": 1.5}, evaluation={"every": 0})
    result = simulate(run, task=TASK)
    size = result.model.vector.nbytes
    for row in result.history:
        assert len(row.clients) == 4
        assert (row.bytes_down, row.bytes_up) == (6 * size, 4 * size)
    assert len({row.clients for row in result.history}) > 1, "another draw each round"


def test_who_is_over_selected_takes_the_place_of_who_failed():
    run = config(2, clients=5, cohort={"size": 4, "over_select": 1.25}, evaluation={"every": 0})
    result = simulate(run, task=replace(TASK, data=one_bad))
    assert result.status == "done"
    assert {row.clients for row in result.history} == {("client-0", "client-2", "client-3", "client-4")}


@pytest.mark.parametrize(("bound", "expected"), [(16, [0, 1, 2, 3, 3, 3]), (1, [0, 1, 1, 1, 1, 1])])
def test_gradients_on_arrival_are_as_stale_as_the_bound_allows(bound: int, expected: list[int]):
    """Clients work in turn: with four of them a gradient is three steps old, unless that is too old."""
    strategy = {"name": "sgd", "max_staleness": bound}
    result = simulate(config(6, strategy=strategy, evaluation={"every": 0}), task=TASK)
    assert result.status == "done"
    assert [row.staleness for row in result.history] == expected
    assert all(len(row.clients) == 1 for row in result.history)
    assert (sum(row.refused for row in result.history) > 0) == (bound == 1)


def test_a_clip_bounds_how_far_a_round_can_move_the_model():
    run = config(1, privacy={"unit": "none", "clip": 0.01}, evaluation={"every": 0})
    start = FlatModule(build_module(TASK, seed=3)).vector
    moved = simulate(run, task=TASK).model.vector - start
    assert 0 < np.linalg.norm(moved) <= 0.01 * (1 + 1e-6)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_a_divided_data_set_trains_as_well(partition: str):
    def whole(site: Site) -> tuple[Any, Any]:
        return data(Site(site.name, index=20))

    run = config(8, clients=5, simulation={"clients": 5, "partition": partition})
    result = simulate(run, task=replace(TASK, data=whole))
    assert result.status == "done"
    assert result.history[-1].metrics["loss"] < result.history[0].metrics["loss"]
