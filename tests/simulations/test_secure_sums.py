"""Simulated secure aggregation: the protocol and its ideal give the same bits, and both the mean there is without."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedge import RunConfig, Site, Task
from fedge.errors import ConfigError
from fedge.privacy.mechanism import Gaussian
from fedge.privacy.rdp import epsilon_of
from fedge_sim import Result, simulate

FAULTS = {"dropout": 0.12, "failure": 0.05, "straggler": 0.05, "corruption": 0.05}


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """A line, of which client i has 4 + i points."""
    assert site.index is not None
    random = torch.Generator().manual_seed(site.index)
    inputs = torch.randn(6 + site.index, 3, generator=random)
    targets = inputs.sum(1, keepdim=True) + 0.1 * torch.randn(len(inputs), 1, generator=random)
    return TensorDataset(inputs[:-2], targets[:-2]), TensorDataset(inputs[-2:], targets[-2:])


TASK = Task(
    model=lambda: nn.Linear(3, 1),
    data=data,
    loss=F.mse_loss,
    metrics={"error": lambda output, target: (output - target).abs().mean()},
)


def run(
    *, secure: dict[str, Any] | None = None, simulation: dict[str, Any] | None = None, **tables: Any
) -> Result:
    table = {
        "name": "trial",
        "task": "app:task",
        "rounds": 4,
        "seed": 5,
        "work": {"batch_size": "full", "learning_rate": 0.1},
        "cohort": {"size": 8, "quorum": 4, "attempts": 100},
        "simulation": {"clients": 8, **(simulation or {})},
        **tables,
    }
    if secure is not None:
        names = ["train_loss", "loss", "error"]
        table["secure_aggregation"] = {"enabled": True, "bound": 2.0, "metrics": names, **secure}
    return simulate(RunConfig.from_table(table, source="run"), task=TASK)


def digest(result: Result) -> str:
    return hashlib.sha256(result.model.vector.tobytes()).hexdigest()


def shown(result: Result) -> list[Any]:
    return [
        (row.round, row.attempt, row.clients, row.num_examples, dict(row.metrics), row.bytes_up)
        for row in result.history
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": {"name": "mirrored_sgd"}},
        {"secure": {"suite": "x25519-mlkem768"}},
        {"secure": {"consistency": False}},
        {"secure": {"bits": 20, "rotate": True, "max_weight": 50}},
        {"simulation": {"faults": FAULTS}},
        {"simulation": {"faults": FAULTS | {"crash_every": 47}}, "rounds": 6},
        {"cohort": {"size": 5, "over_select": 1.6, "quorum": 4, "attempts": 100}},
    ],
    ids=lambda settings: str(settings)[:60],
)
def test_the_protocol_and_its_ideal_give_the_same_bits(settings: dict[str, Any]):
    simulation = settings.pop("simulation", {})
    secure = settings.pop("secure", {})
    ideal, protocol = (
        run(secure=secure, simulation={**simulation, "secure_aggregation": mode}, **settings)
        for mode in ("ideal", "protocol")
    )
    assert ideal.status == "done"
    assert digest(ideal) == digest(protocol)
    assert shown(ideal) == shown(protocol)
    assert ideal.faults == protocol.faults


@pytest.mark.parametrize("strategy", ["fedavg", "mirrored_sgd"])
def test_the_secure_mean_is_the_mean_but_for_its_rounding(strategy: str):
    plain = run(strategy={"name": strategy})
    secure = run(strategy={"name": strategy}, secure={"bound": 20.0, "max_weight": 20})
    assert np.allclose(plain.model.vector, secure.model.vector, atol=1e-5)
    for one, other in zip(plain.history, secure.history, strict=True):
        assert one.num_examples == other.num_examples
        assert one.clients == other.clients
        assert one.metrics == pytest.approx(dict(other.metrics), abs=1e-5)


def test_fewer_bits_cost_accuracy_and_are_fewer_bytes():
    plain = run()
    found = {bits: run(secure={"bits": bits, "max_weight": 20}) for bits in (16, 32)}
    error = {
        bits: float(np.abs(each.model.vector - plain.model.vector).max()) for bits, each in found.items()
    }
    assert error[32] < error[16] < 0.05
    tail = 8 * (2 + 2 * 4)  # members, weight, and three metrics beside that of updates beyond the bound
    up = {bits: each.history[-1].bytes_up for bits, each in found.items()}
    assert up == {bits: 8 * (4 * bits // 8 + tail) + 8 * tail for bits in (16, 32)}  # trained, and evaluated


def test_updates_that_are_cut_to_the_bound_are_seen_in_the_history():
    whole, cut = run(secure={"bound": 5.0}), run(secure={"bound": 0.01})
    assert not any("beyond_bound" in row.metrics for row in whole.history)
    assert [row.metrics["beyond_bound"] for row in cut.history] == [1.0] * 4


def test_a_metric_that_is_not_agreed_on_does_not_ride():
    result = run(secure={"metrics": ["error"]})
    assert set(result.history[-1].metrics) == {"error"}


def test_a_round_whose_coordinator_crashed_behind_a_reveal_is_skipped_and_the_run_goes_on():
    crash = {"faults": {"crash_every": 77}}  # between the reveals of the second round, and of each second one
    result = run(secure={}, rounds=6, evaluation={"every": 0}, simulation=crash)
    assert result.status == "done"
    assert [(row.round, row.attempt) for row in result.history] == [(n, 1) for n in range(1, 7)]
    assert [len(row.clients) for row in result.history] == [8, 0, 8, 0, 8, 0]
    assert [row.num_examples > 0 for row in result.history] == [True, False] * 3


def test_a_coordinator_that_crashes_in_every_attempt_ends_the_run_and_says_so():
    result = run(secure={}, simulation={"faults": {"crash_every": 5}})
    assert result.status == "failed"
    assert (
        "between which it cannot be completed: choose a larger simulation.faults.crash_every" in result.reason
    )


def test_many_clients_sum_in_shards_and_the_mean_is_the_same():
    def thousand(**more: Any) -> Result:
        return run(
            rounds=1,
            evaluation={"every": 0},
            cohort={"size": 300, "quorum": 200},
            simulation={"clients": 300},
            **more,
        )

    plain, secure = thousand(), thousand(secure={})
    assert len(secure.history[0].clients) == 300
    assert np.allclose(plain.model.vector, secure.model.vector, atol=1e-5)
    assert secure.history[0].metrics == pytest.approx(dict(plain.history[0].metrics), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cohort": {"size": 2}, "simulation": {"clients": 2}}, "cohort.quorum: expected 3 or more"),
        ({"strategy": {"name": "sgd"}}, "expected a strategy with rounds"),
        ({"secure": {"bits": 8}}, "use more bits, smaller weights or fewer clients"),
        ({"secure": {"threshold": 0.6}}, "secure_aggregation.threshold"),
        ({"secure": {"metrics": ["a", "a"]}}, "different names"),
        ({"secure": {"bits": 64}}, "secure_aggregation.bits"),
        (
            {"privacy": {"unit": "client", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0}},
            'bound and metrics say what privacy.unit = "client" decides',
        ),
    ],
)
def test_what_cannot_be_summed_is_refused_when_it_is_configured(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        run(**{"secure": {}} | settings)


CLIENT_LEVEL = {"unit": "client", "delta": 1e-5, "clip": 1.0, "noise_multiplier": 0.5}
PRIVATE_SUMS = {"enabled": True}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": {"name": "mirrored_sgd"}},
        {"secure_aggregation": {"enabled": True, "rotate": True, "bits": 20}},
        {"simulation": {"faults": {"dropout": 0.2}, "clients": 8}},
    ],
    ids=["plain", "gradients", "rotated", "dropouts"],
)
def test_private_sums_are_the_same_with_and_without_the_protocol(settings: dict[str, Any]):
    both = []
    for way in ("ideal", "protocol"):
        tables: dict[str, Any] = {"privacy": CLIENT_LEVEL, "secure_aggregation": PRIVATE_SUMS} | settings
        tables["simulation"] = {**tables.get("simulation", {}), "secure_aggregation": way}
        both.append(run(**tables))
    ideal, protocol = both
    assert ideal.status == "done"
    assert digest(ideal) == digest(protocol)
    assert shown(ideal) == shown(protocol)
    assert ideal.privacy == protocol.privacy
    assert all(not row.metrics for row in ideal.history), "no metric of private data rides along"


def test_clients_pay_for_what_the_noise_of_the_honest_ones_is_worth():
    tables = {"privacy": CLIENT_LEVEL, "secure_aggregation": PRIVATE_SUMS}
    whole = run(**tables, cohort={"size": 8})
    half = run(**tables, cohort={"size": 8, "quorum": 4})
    assert whole.privacy.epsilon == pytest.approx(half.privacy.epsilon, rel=1e-3), "each kept its promise"
    gaussian = epsilon_of(
        [Gaussian(0.5, 4)], 1e-5
    )  # of which Skellam noise's bound is a little more than enough
    assert gaussian <= whole.privacy.epsilon <= 1.01 * gaussian
    # With all eight in it, the second has more noise in its sums, since as few as four may be in them.
    assert half.model.vector.tolist() != whole.model.vector.tolist()


def test_the_noise_in_the_model_is_that_of_all_who_took_part():
    """One round whose updates are all but nothing: what the model moves by is the noise."""
    tables: dict[str, Any] = {
        "rounds": 1,
        "privacy": {**CLIENT_LEVEL, "noise_multiplier": 40.0},
        "secure_aggregation": PRIVATE_SUMS,
        "cohort": {"size": 8},
        "work": {"batch_size": "full", "learning_rate": 1e-9},
    }
    result = [run(**tables, seed=seed) for seed in range(60)]
    still = [run(**tables | {"privacy": {"unit": "none"}}, seed=seed) for seed in range(60)]
    moved = np.stack([a.model.vector - b.model.vector for a, b in zip(result, still, strict=True)])
    # Eight sites' noise, of which six are counted on, on a sum of vectors of norm 1 that is divided by 8.
    assert moved.std() == pytest.approx(40.0 * math.sqrt(8 / 6) / 8, rel=0.2)


def test_private_examples_are_evaluated_inside_a_secure_sum():
    privacy = {
        "unit": "example",
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip": 1.0,
        "evaluation_noise_multiplier": 20.0,
    }
    result = run(secure={}, privacy=privacy, evaluation={"every": 2})
    assert result.status == "done"
    evaluated = [row.metrics for row in result.history if "loss" in row.metrics]
    assert len(evaluated) == 2


def test_examples_stay_private_inside_a_secure_sum():
    privacy = {"unit": "example", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0}
    result = run(secure={}, privacy=privacy)
    assert result.status == "done"
    assert result.history[-1].num_examples == 8
    assert result.privacy is not None
