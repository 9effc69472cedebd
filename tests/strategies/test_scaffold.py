"""SCAFFOLD against its paper: Karimireddy et al. 2020, Algorithm 1 with option II, in float64 and as it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.config import parse_toml
from fedge.errors import ConfigError, RunError
from fedge.pipeline import Aggregate, Pipeline, Update
from fedge.run import RunConfig, Work
from fedge.strategy import load_strategy
from fedge.variates import correct, renewed, unsuited
from fedge.vector import Array, Layout, Model, Tensor
from fedge_strategies import FedAvg, Scaffold

FEATURES = 4
LAYOUT = Layout((Tensor("w", (FEATURES,)), Tensor("mean", (2,), role="buffer")))
Wide = npt.NDArray[np.float64]


class Quadratic:
    """A client with f(w) = (w - a)' H (w - a) / 2, whose best is far from that of the others."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.hessian = np.diag(random.uniform(0.2, 2.0, FEATURES))
        self.best = 3 * random.normal(size=FEATURES)

    def gradient(self, w: Wide) -> Wide:
        return self.hessian @ (w - self.best)


def optimum(clients: Sequence[Quadratic]) -> Wide:
    hessian = np.mean([each.hessian for each in clients], axis=0)
    return np.linalg.solve(hessian, np.mean([each.hessian @ each.best for each in clients], axis=0))


def printed(clients: Sequence[Quadratic], cohorts: Sequence[Sequence[int]], work: Work, rate: float) -> Wide:
    """Algorithm 1: clients send both what their model and what their control variate has moved by."""
    assert work.steps is not None
    x, c = np.zeros(FEATURES), np.zeros(FEATURES)
    own = [np.zeros(FEATURES) for _ in clients]
    for cohort in cohorts:
        moves, changes = [], []
        for i in cohort:
            y = x.copy()
            for _ in range(work.steps):
                y = y - work.learning_rate * (clients[i].gradient(y) - own[i] + c)
            new = own[i] - c + (x - y) / (work.steps * work.learning_rate)
            moves.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x = x + rate * np.mean(moves, axis=0)
        c = c + len(cohort) / len(clients) * np.mean(changes, axis=0)
    return np.asarray(x)


class Federation:
    """The same by the strategy, with clients as `fedge.variates` has them: they send their updates alone."""

    def __init__(self, clients: Sequence[Quadratic], work: Work, strategy: Any) -> None:
        self.clients, self.work, self.strategy = clients, work, strategy
        self.state = strategy.init(Model(np.zeros(LAYOUT.size, np.float32), LAYOUT))
        self.own: dict[int, Array] = {}

    def round(self, cohort: Sequence[int]) -> None:
        control = self.strategy.order(self.state, 1).control
        reduction = Pipeline(self.strategy.reduction)
        folded = reduction.start(LAYOUT.size)
        for i in cohort:
            folded = reduction.fold(folded, Update(f"client-{i}", self._update(i, control), 1))
        self.state = self.strategy.step(self.state, reduction.finish(folded))

    def _update(self, i: int, control: Array | None) -> Array:
        drift = np.zeros(FEATURES, np.float32)
        if control is not None:
            drift[:] = control
            correct(drift, self.own.get(i))
        before = self.state.model[:FEATURES].astype(np.float64)
        y = before.copy()
        for _ in range(self.work.steps or 1):
            y -= self.work.learning_rate * (self.clients[i].gradient(y) + drift)
        update = np.zeros(LAYOUT.size, np.float32)
        update[:FEATURES] = y - before
        update[FEATURES:] = 0.25  # what a batch's statistics do
        if control is not None:
            self.own[i] = renewed(drift, update, self.work)
        return update

    @property
    def w(self) -> Array:
        found: Array = self.state.model[:FEATURES]
        return found


WORK = Work(steps=5, learning_rate=0.1)
COUNT = 6
COHORTS = st.lists(st.sets(st.integers(0, COUNT - 1), min_size=1).map(sorted), min_size=1, max_size=12)


@given(cohorts=COHORTS, rate=st.sampled_from([1.0, 0.5]), steps=st.integers(1, 8), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_whoever_takes_part_the_model_is_that_of_the_algorithm_as_it_is_printed(
    cohorts: list[list[int]], rate: float, steps: int, seed: int
):
    clients = [Quadratic(100 * seed + at) for at in range(COUNT)]
    work = Work(steps=steps, learning_rate=0.1)
    strategy = Scaffold(COUNT, rate, "uniform", steps=steps, learning_rate=0.1)
    found = Federation(clients, work, strategy)
    for cohort in cohorts:
        found.round(cohort)
    assert np.allclose(found.w, printed(clients, cohorts, work, rate), rtol=1e-4, atol=1e-4)
    mean = np.mean([found.own.get(at, np.zeros(FEATURES)) for at in range(COUNT)], axis=0)
    assert np.allclose(found.state.control, mean, rtol=1e-4, atol=1e-4), (
        "the server's is the mean of all clients'"
    )
    assert np.allclose(found.state.model[FEATURES:], 0.25 * len(cohorts)), "buffers are averaged as they are"


def test_it_finds_the_common_optimum_where_federated_averaging_is_drawn_from_it():
    clients = [Quadratic(at) for at in range(COUNT)]
    random = np.random.default_rng(1)
    cohorts = [random.choice(COUNT, 3, replace=False).tolist() for _ in range(300)]
    work = Work(steps=20, learning_rate=0.1)
    drifting = Federation(clients, work, FedAvg(weighting="uniform"))
    steady = Federation(clients, work, Scaffold(COUNT, 1.0, "uniform", steps=20, learning_rate=0.1))
    for cohort in cohorts:
        drifting.round(cohort)
        steady.round(cohort)
    best = optimum(clients)
    assert np.linalg.norm(steady.w - best) < 1e-3
    assert np.linalg.norm(drifting.w - best) > 0.3


def test_what_a_client_keeps_is_the_mean_of_its_gradients_on_the_way():
    client = Quadratic(3)
    found = Federation([client], WORK, Scaffold(1, steps=5, learning_rate=0.1))
    found.round([0])
    y, seen = np.zeros(FEATURES), []
    for _ in range(5):
        seen.append(client.gradient(y))
        y -= 0.1 * seen[-1]
    assert np.allclose(found.own[0], np.mean(seen, axis=0), rtol=1e-5)


def run(work: str, strategy: str = "clients = 8", size: int = 4, more: str = "") -> RunConfig:
    text = f"""
    name = "a"
    task = "app:task"
    rounds = 1
    [strategy]
    name = "scaffold"
    {strategy}
    [work]
    {work}
    [cohort]
    size = {size}
    {more}
    """
    return parse_toml(text, RunConfig, source="run.toml")


def test_it_takes_its_steps_and_learning_rate_from_the_work():
    found = load_strategy(run("steps = 3\nlearning_rate = 0.5"))
    assert found == Scaffold(8, steps=3, learning_rate=0.5)
    assert load_strategy(run("steps = 3")) == Scaffold(8, steps=3)


WRONG = {
    "no steps": (
        "",
        "clients = 8",
        "strategy scaffold: control variates need the same number of local steps",
    ),
    "epochs": ("epochs = 2", "clients = 8", "set work.steps"),
    "adam": ('steps = 2\noptimizer = "adam"', "clients = 8", "expected work.optimizer sgd, found adam"),
    "too few": (
        "steps = 2",
        "clients = 3",
        r"strategy.clients: expected .* 4 \(cohort.size\) or more, found 3",
    ),
    "not said": ("steps = 2", "", "expected a key 'strategy.clients', found none"),
    "none": ("steps = 2", "clients = 0", "strategy.clients: Input should be greater than or equal to 1"),
    "other steps": ("steps = 2", "clients = 8\nsteps = 3", "learning_rate of .work., 2 and 0.05, found 3"),
    "other rate": ("steps = 2", "clients = 8\nlearning_rate = 0.1", "found 2 and 0.1: leave them out"),
}


@pytest.mark.parametrize(("work", "strategy", "words"), WRONG.values(), ids=WRONG)
def test_a_run_whose_sites_could_not_do_it_is_refused(work: str, strategy: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_strategy(run(work, strategy))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "[privacy]\nunit = 'client'\nepsilon = 1.0\ndelta = 1e-3\nclip = 1.0",
            "cannot have noise in the mean",
        ),
        (
            "[secure_aggregation]\nenabled = true\nrotate = true",
            "secure_aggregation.rotate: with strategy scaffold",
        ),
    ],
    ids=["noise in the mean", "rotated sums"],
)
def test_what_would_be_in_the_servers_variate_and_in_no_clients_is_refused(more: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_strategy(run("steps = 2", more=more))


def test_weights_by_examples_are_for_rounds_in_which_everybody_takes_part():
    by_examples = "clients = 4\nweighting = 'examples'"
    assert load_strategy(run("steps = 2", by_examples)).weighting == "examples"
    for size, more in ((3, ""), (4, "quorum = 3")):
        with pytest.raises(
            ConfigError, match=r"strategy\.weighting: expected uniform where not all 4 clients"
        ):
            load_strategy(run("steps = 2", by_examples, size, more))


def test_a_control_variate_that_is_no_number_ends_the_run():
    strategy = Scaffold(1, steps=1, learning_rate=1e-30)
    state = strategy.init(Model(np.zeros(LAYOUT.size, np.float32), LAYOUT))
    far = Aggregate(np.full(LAYOUT.size, 1e20, np.float32), ("client-0",), 1)
    with pytest.raises(RunError, match="NaN or infinity"):
        strategy.step(state, far)


def test_work_that_has_no_number_of_steps_renews_nothing():
    assert unsuited(WORK) == ""
    with pytest.raises(ValueError, match=r"set work\.steps"):
        renewed(np.zeros(2, np.float32), np.zeros(2, np.float32), Work(epochs=1))
