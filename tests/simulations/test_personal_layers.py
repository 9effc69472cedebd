"""Simulated clients with layers of their own: FedPer as it is printed, in every engine, whatever happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from simulated import FAULTS, PERSONAL, accuracy, config, data, forgetful, perceptron
from torch import nn

from fedge import Site, Task
from fedge.errors import LayoutError
from fedge.events import OrderId
from fedge.personal import Split
from fedge.run import RunConfig
from fedge.seeds import work_seed
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer
from fedge_sim import Result, simulate
from fedge_sim.variates import Layers

TASK = Task(model=perceptron, data=data, loss=F.cross_entropy, metrics={"accuracy": accuracy})
COUNT = 8


def printed(run: RunConfig, task: Task, result: Result) -> tuple[Any, list[float]]:
    """Arivazhagan et al. 2019, Algorithm 1, on the same cohorts: the shared layers, and the mean losses of everybody on
    their own test sets, each with its own layers."""
    trainer, first = Trainer(task, seed=run.seed), framework.initial_model(task, seed=run.seed)
    split = Split.of(first.layout, run.work.personal)
    base = split.shared_of(first.vector).astype(np.float64)
    own = {f"client-{at}": split.personal_of(first.vector) for at in range(COUNT)}
    sets = {name: data(Site(name, index=at, count=COUNT)) for at, name in enumerate(own)}
    losses = []
    for row in result.history:
        moved, weights = [], []
        for name in row.clients:
            whole, out = split.join(base.astype(np.float32), own[name]), np.empty_like(first.vector)
            seed = work_seed(run.seed, site=name, kind="train", round=row.round)
            done = trainer.train(whole, sets[name][0], run.work, seed=seed, out=out)
            own[name] = split.personal_of(whole + out)
            moved.append(split.shared_of(out))
            weights.append(done.num_examples)
        base = (base + np.average(np.stack(moved).astype(np.float64), axis=0, weights=weights)).astype(
            np.float32
        )
        judged = [
            trainer.evaluate(split.join(base.astype(np.float32), own[name]), sets[name][1]) for name in own
        ]
        sizes = [each.num_examples for each in judged]
        losses.append(float(np.average([each.metrics["loss"] for each in judged], weights=sizes)))
    return base, losses


@pytest.mark.parametrize("engine", ["loop", "vectorised", "processes"])
@pytest.mark.parametrize("personal", [["2.*"], ["0.weight", "2.bias"], ["*bias"]], ids=str)
def test_a_simulated_run_is_the_algorithm_as_it_is_printed(engine: Any, personal: list[str]):
    run = config(rounds=6, work={**PERSONAL, "personal": personal}, evaluation={"clients": COUNT})
    found = simulate(run, task=TASK, engine=engine)
    base, losses = printed(run, TASK, found)
    assert len(found.history) == 6
    assert len(found.model.vector) == len(base) < 83
    assert np.allclose(found.model.vector, base, rtol=1e-4, atol=1e-5)
    assert [row.metrics["loss"] for row in found.history] == pytest.approx(losses, rel=1e-3)


def test_what_is_personal_is_neither_sent_nor_in_the_result():
    run = config(work=PERSONAL, evaluation={"every": 0})
    found, whole = simulate(run, task=TASK), simulate(config(evaluation={"every": 0}), task=TASK)
    assert found.model.layout.names == ["0.weight", "0.bias"]
    shared, all_of_it = found.model.layout.nbytes, whole.model.layout.nbytes
    assert all_of_it - shared == 4 * (8 * 3 + 3)
    for name in ("bytes_up", "bytes_down"):
        assert getattr(found.history[0], name) * all_of_it == getattr(whole.history[0], name) * shared


def test_batch_normalisation_of_ones_own_is_never_averaged():
    """FedBN: its statistics are buffers, which would else be averaged."""
    task = Task(model=forgetful, data=data, loss=F.cross_entropy)
    found = simulate(
        config(work={**PERSONAL, "batch_size": "full", "personal": ["1.*"]}), task=task, engine="loop"
    )
    assert found.status == "done"
    assert not {name for name in found.model.layout.names if name.startswith("1.running")}
    assert "1.num_batches_tracked" in found.model.layout.names, "which is carried, and nobody's"


def test_what_does_not_fit_in_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch):
    held = simulate(config(work=PERSONAL), task=TASK, engine="loop")
    monkeypatch.setattr(Layers.__init__, "__kwdefaults__", {"most_bytes": 0})
    spilled = simulate(config(work=PERSONAL), task=TASK, engine="loop")
    assert np.array_equal(held.model.vector, spilled.model.vector)
    assert held.history[-1].metrics == spilled.history[-1].metrics


def test_a_crash_of_the_coordinator_changes_no_bit():
    whole = simulate(config(work=PERSONAL), task=TASK, engine="loop")
    faults = {"clients": COUNT, "faults": {"crash_every": 5}}
    crashed = simulate(config(work=PERSONAL, simulation=faults), task=TASK, engine="loop")
    assert crashed.faults.crashes > 0
    assert np.array_equal(whole.model.vector, crashed.model.vector)


@pytest.mark.parametrize("engine", ["loop", "vectorised"])
def test_who_did_not_count_has_learned_nothing(engine: Any):
    """Clients whose updates were lost, were late or too many begin again where they were."""
    cohort = {"size": 6, "quorum": 3, "over_select": 1.3, "attempts": 20}
    run = config(rounds=6, work=PERSONAL, cohort=cohort, simulation={"clients": COUNT, "faults": FAULTS})
    found = simulate(run, task=TASK, engine=engine)
    assert any(row.refused for row in found.history) or any(len(row.clients) < 6 for row in found.history)
    base, _ = printed(run, TASK, found)
    assert np.allclose(found.model.vector, base, rtol=1e-4, atol=1e-5)


def test_layers_are_a_clients_own_once_the_round_is_committed():
    first = np.zeros(2, np.float32)
    kept = Layers(first)
    one, other = OrderId("train", 1, 1), OrderId("train", 1, 2)
    kept.learned("a", one, first + 1)
    assert kept.of("a", other) is first, "another attempt at a round begins as the first one did"
    kept.learned("a", other, first + 2)
    kept.learned("b", other, first + 3)
    kept.commit(other, ["a"], None)
    judged = OrderId("evaluate", 1, 1)
    assert [float(kept.of(name, judged)[0]) for name in "ab"] == [2.0, 0.0]


def test_layers_that_learn_nothing_finite_are_refused_and_not_kept():
    """The shared part alone would pass."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))

    def loss(output: Any, target: Any) -> Any:
        return F.cross_entropy(output * 1e30, target)

    run = config(work={**PERSONAL, "learning_rate": 1e25, "personal": ["1.bias"]}, rounds=1)
    for engine in ("loop", "vectorised"):
        found = simulate(run, task=Task(model=model, data=data, loss=loss), engine=engine)
        assert found.status == "failed"
        assert found.history == ()


def test_a_model_without_such_layers_is_said_before_anything_is_done():
    with pytest.raises(LayoutError, match=r"work\.personal: expected names of .*found 'head\.\*'"):
        simulate(config(work={**PERSONAL, "personal": ["head.*"]}), task=TASK)


def test_clients_who_differ_in_what_they_call_things_learn_more_with_a_head_of_their_own():
    """The same inputs, whose labels each client has turned in its own way."""

    def turned(site: Site) -> Any:
        train, test = data(Site(site.name, index=30, count=site.count))
        for each in (train, test):
            each.tensors = each.tensors[0], (each.tensors[1] + (site.index or 0)) % 3
        return train, test

    task = Task(model=perceptron, data=turned, loss=F.cross_entropy, metrics={"accuracy": accuracy})
    work = {"epochs": 3, "batch_size": 8, "learning_rate": 0.2}
    tables: dict[str, Any] = {"rounds": 20, "cohort": {"size": COUNT}}
    loss = {
        name: simulate(config(**tables, work=work | own), task=task).history[-1].metrics["train_loss"]
        for name, own in (("shared", {}), ("personal", {"personal": ["2.*"]}))
    }
    assert loss["personal"] < 0.5 * loss["shared"]
