"""Tasks that train by themselves, in a simulation: by the loop, with their own data, and what each client keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedge.errors import ConfigError, RefusedError, TaskError
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.task import OwnTask, Site
from fedge.vector import Layout, Model, Tensor
from fedge_client.local import Outcome
from fedge_sim import simulate

LAYOUT = Layout.of([Tensor("w", (3,), "float32", "trainable")])


class Local:
    """A client that goes half the way to its own number, and counts how often."""

    layout, examples = LAYOUT, (0, 0)

    def __init__(self, site: Site, work: Any) -> None:
        assert site.index is not None
        self.site, self.index, self.turns = site, site.index, 0

    def do(self, order: Any, *, seed: int, model: Any, out: Any, private: Any, progress: Any) -> Outcome:
        assert private is None
        if order.kind == "evaluate":
            return Outcome(1, {"loss": float(np.square(model - self.index).mean())})
        self.turns += 1
        progress(1, 1)
        out[:] = (self.index - model) / 2
        return Outcome(1 + self.index, {"train_loss": 0.0, "turns": float(self.turns)})


TASK = OwnTask(lambda seed: Model(np.zeros(3, np.float32), LAYOUT), Local)


def run(**tables: Any) -> RunConfig:
    table = {"name": "own", "task": "app:task", "rounds": 4, "cohort": {"size": 3}, "seed": 5}
    return RunConfig.from_table({**table, **tables}, source="test")


def test_it_is_averaged_like_any_other_and_keeps_what_it_keeps():
    found = simulate(run(cohort={"size": 5}), task=TASK, clients=5)
    w = 0.0
    for _ in range(4):
        w += np.average([(index - w) / 2 for index in range(5)], weights=[1 + index for index in range(5)])
    assert np.allclose(found.model.vector, w, atol=1e-6)
    assert found.history[-1].metrics["turns"] == 4.0
    assert found.engine == "loop"


@pytest.mark.parametrize(
    "tables",
    [
        {"simulation": {"faults": {"dropout": 0.2, "failure": 0.1, "duplicate": 0.1, "crash_every": 7}}},
        {"simulation": {"adversaries": {"share": 0.4, "attack": "sign_flip"}}},
        {"secure_aggregation": {"enabled": True, "metrics": []}},
        {
            "secure_aggregation": {"enabled": True},
            "privacy": {"unit": "client", "epsilon": 50.0, "delta": 1e-4, "clip": 5.0},
        },
    ],
    ids=["faults", "adversaries", "secure sums", "client-level privacy"],
)
def test_everything_that_looks_at_updates_alone_works_and_the_same_seed_gives_the_same_bits(tables: Any):
    found = [simulate(run(**tables), task=TASK, clients=6) for _ in range(2)]
    assert found[0].status == "done", found[0].reason
    assert np.array_equal(found[0].model.vector, found[1].model.vector)
    plain = simulate(run(), task=TASK, clients=6)
    assert not np.array_equal(found[0].model.vector, plain.model.vector), "it has done something"
    assert np.abs(found[0].model.vector).max() < 20


class Declines(Local):
    """Refuses its second order."""

    def do(self, order: Any, **others: Any) -> Outcome:
        if order.kind == "train" and self.turns == 1 and self.index == 0:
            self.turns += 1
            raise RefusedError(Refusal(RefusalCode.WORK_NOT_ALLOWED, "not now"))
        return super().do(order, **others)


def test_a_client_that_refuses_costs_its_part_and_the_others_go_on():
    cohort = {"size": 5, "quorum": 3}
    found = simulate(run(cohort=cohort), task=OwnTask(TASK.initial, Declines), clients=5)
    assert found.status == "done", found.reason
    assert [row.clients for row in found.history if row.round == 2] != [5]


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"simulation": {"partition": "iid"}}, r"simulation\.partition"),
        ({"simulation": {"feature_skew": 0.5}}, r"simulation\.feature_skew"),
        ({"simulation": {"label_noise": 0.5}}, r"simulation\.label_noise"),
        ({"simulation": {"adversaries": {"share": 0.5, "attack": "label_flip"}}}, r"simulation\.adversaries"),
        ({"simulation": {"devices": {}}}, r"simulation\.devices"),
    ],
    ids=["partition", "features", "labels", "adversaries", "devices"],
)
def test_what_would_need_its_data_is_refused(tables: Any, says: str):
    with pytest.raises(ConfigError, match=says):
        simulate(run(**tables), task=TASK, clients=6)


def test_its_examples_cannot_be_protected():
    privacy = {"unit": "example", "epsilon": 2.0, "delta": 1e-5, "clip": 1.0}
    with pytest.raises(RefusedError, match="trains by itself"):
        simulate(run(privacy=privacy, evaluation={"every": 0}), task=TASK, clients=6)


@pytest.mark.parametrize("engine", ["vectorised", "processes", "ray"])
def test_an_engine_that_cannot_train_it_is_refused(engine: Any):
    with pytest.raises(ConfigError, match=f"engine {engine}: expected loop"):
        simulate(run(), task=TASK, clients=6, engine=engine)


def test_what_its_code_raises_says_where():
    def fails(site: Site, work: Any) -> Any:
        raise ValueError("no file")

    with pytest.raises(TaskError, match=r"client-.*, train order of round 1.*ValueError: no file"):
        simulate(run(), task=OwnTask(TASK.initial, fails), clients=6)
