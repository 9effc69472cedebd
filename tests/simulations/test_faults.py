"""Laws of injected faults: they follow from the seed, cost the part of whom they strike, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from fedge import RunConfig, Site, Task, federation
from fedge.errors import ConfigError
from fedge.events import Arrived, DeadlinePassed, Failed, Joined, Left, OrderId, Reject
from fedge.history import Row
from fedge.learning import Learning
from fedge.pipeline import Update
from fedge.refusal import RefusalCode
from fedge.run_state import RunEffect, RunEvent
from fedge.seeds import work_seed
from fedge.simulation import FaultsConfig
from fedge.strategy import load_strategy
from fedge.vector import Array
from fedge_client.torch.framework import framework
from fedge_client.torch.trainer import Trainer
from fedge_sim import Result, simulate
from fedge_sim.faults import FAULTS, Strike, draw

STRATEGIES = ("fedavg", "mirrored_sgd", "sgd")
EVERYTHING = {"dropout": 0.1, "failure": 0.1, "straggler": 0.1, "corruption": 0.1, "duplicate": 0.1}
UNTIMED = [fault for fault in FAULTS if fault != "delay"]


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """A line, of which client i has 4 + i points."""
    assert site.index is not None
    random = torch.Generator().manual_seed(site.index)
    inputs = torch.randn(6 + site.index, 3, generator=random)
    targets = inputs.sum(1, keepdim=True) + 0.1 * torch.randn(len(inputs), 1, generator=random)
    return TensorDataset(inputs[:-2], targets[:-2]), TensorDataset(inputs[-2:], targets[-2:])


TASK = Task(model=lambda: nn.Linear(3, 1), data=data, loss=F.mse_loss)


def config(
    rounds: int = 6, clients: int = 8, faults: dict[str, Any] | None = None, **tables: Any
) -> RunConfig:
    table = {
        "name": "trial",
        "task": "app:task",
        "rounds": rounds,
        "seed": 5,
        "work": {"batch_size": "full", "learning_rate": 0.1},
        "cohort": {"size": 4, "quorum": 3, "over_select": 1.5},
        "evaluation": {"every": 0},
        "simulation": {"clients": clients} | ({} if faults is None else {"faults": faults}),
        **tables,
    }
    return RunConfig.from_table(table, source="run.toml")


def run(*arguments: Any, **tables: Any) -> Result:
    return simulate(config(*arguments, **tables), task=TASK)


def bits(result: Result) -> bytes:
    return result.model.vector.tobytes()


def timeless(result: Result) -> list[Row]:
    return [replace(row, seconds=0.0) for row in result.history]


def struck(result: Result, row: Row, fault: str = "") -> set[str]:
    """Who had a fault that costs its part (or this one) at the order of which a row tells."""
    return {
        strike.client
        for strike in result.faults.strikes
        if (strike.order.round, strike.order.attempt) == (row.round, row.attempt)
        and strike.order.kind != "evaluate"
        and (strike.fault == fault if fault else strike.fault != "duplicate")
    }


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunEvent, tuple[RunEffect, ...]]]:
    """Every event that the machine was given, and the effects that it answered."""
    seen: list[tuple[RunEvent, tuple[RunEffect, ...]]] = []
    real: Callable[..., federation.RunStep] = federation.step

    def step(machine: federation.Federation, event: RunEvent) -> federation.RunStep:
        machine, effects = real(machine, event)
        seen.append((event, effects))
        return machine, effects

    monkeypatch.setattr(federation, "step", step)
    return seen


# The draw.


def test_a_fault_is_as_probable_as_the_table_says():
    faults = FaultsConfig(dropout=0.3, failure=0.05, straggler=0.2, corruption=0.1)
    orders = [OrderId("train", round, attempt) for round in range(1, 1001) for attempt in (1, 2)]
    drawn = [draw(faults, seed=1, client=client, order=order) for order in orders for client in "abcde"]
    found = Counter(drawn)
    for fault in FAULTS:
        assert found[fault] / len(drawn) == pytest.approx(getattr(faults, fault), abs=0.02)
    assert found[None] / len(drawn) == pytest.approx(0.35, abs=0.02)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_probability_of_one_is_certain_and_one_of_zero_impossible(fault: str):
    orders = [OrderId("train", round) for round in range(1, 2001)]
    certain = FaultsConfig(**{fault: 1.0})
    assert {draw(certain, seed=0, client="a", order=order) for order in orders} == {fault}
    assert {draw(FaultsConfig(), seed=0, client="a", order=order) for order in orders} == {None}


def test_a_draw_is_the_same_for_ever_and_another_for_every_seed_order_and_client():
    faults = FaultsConfig(dropout=0.25, failure=0.25, straggler=0.25, corruption=0.25)

    def drawn(seed: int = 1, client: str = "a", **order: Any) -> list[str]:
        orders = (replace(OrderId("train", round), **order) for round in range(1, 9))
        return [draw(faults, seed=seed, client=client, order=order) or "" for order in orders]

    assert drawn() == drawn()
    assert [fault[0] for fault in drawn()] == DRAWN
    others = [drawn(seed=2), drawn(client="b"), drawn(attempt=2), drawn(kind="gradient")]
    assert len({tuple(each) for each in [drawn(), *others]}) == 5


DRAWN = list("ddcscscc")


# A run with faults.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_table_of_zeros_equals_no_table_to_the_bit(strategy: str):
    zeros = dict.fromkeys(FAULTS, 0.0) | {"crash_every": 0}
    tables = {"strategy": {"name": strategy}, "evaluation": {"every": 2}}
    without, with_zeros = run(**tables), run(faults=zeros, **tables)
    assert bits(with_zeros) == bits(without)
    assert timeless(with_zeros) == timeless(without)
    assert with_zeros.faults.strikes == without.faults.strikes == ()
    assert set(without.summary()["faults"].values()) == {0}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_faults_and_bits_and_another_seed_others(strategy: str):
    made = config(faults=EVERYTHING | {"crash_every": 7}, strategy={"name": strategy})
    one, same, other = (simulate(made, task=TASK, seed=seed) for seed in (5, 5, 6))
    assert one.faults == same.faults
    assert (bits(one), timeless(one)) == (bits(same), timeless(same))
    assert one.faults.strikes != other.faults.strikes
    assert bits(one) != bits(other)


def test_whom_a_fault_strikes_depends_on_nothing_but_its_draw():
    """Not on who else was asked, and in which order: here each is asked by every one of these runs."""
    made = [run(faults=EVERYTHING, cohort={"size": 8, "quorum": 1, "over_select": o}) for o in (1.0, 2.0)]
    table = FaultsConfig(**EVERYTHING)
    names = [f"client-{index}" for index in range(8)]
    expected = {
        Strike(fault, client, order)
        for order in (OrderId("train", round) for round in range(1, 7))
        for client in names
        if (fault := draw(table, seed=5, client=client, order=order)) is not None
    }
    assert expected
    for result in made:
        assert set(result.faults.strikes) == expected
        assert len(result.faults.strikes) == len(expected)


@pytest.mark.parametrize("strategy", ["fedavg", "mirrored_sgd"])
def test_every_round_commits_with_some_asked_in_excess_and_a_tenth_dropping_out(strategy: str):
    cohort = {"size": 10, "over_select": 1.3}
    result = run(50, 20, {"dropout": 0.1}, cohort=cohort, strategy={"name": strategy})
    assert (result.status, len(result.history)) == ("done", 50)
    assert {len(row.clients) for row in result.history} == {10}
    assert {row.attempt for row in result.history} == {1}
    assert 30 <= result.faults.counts["dropout"] <= 80


def test_a_round_is_of_everybody_but_those_who_drop_out_of_it_and_they_are_back_for_the_next(steps: Any):
    everybody = {f"client-{index}" for index in range(8)}
    result = run(12, faults={"dropout": 0.2}, cohort={"size": 8, "quorum": 4})
    assert result.status == "done"
    for row in result.history:
        assert set(row.clients) == everybody - struck(result, row)
    events = [event for event, _ in steps if isinstance(event, Joined | Left)]
    left = [event.client for event in events if isinstance(event, Left)]
    assert left == [strike.client for strike in result.faults.strikes]
    assert len(events) >= 2 * len(left) - len(struck(result, result.history[-1])), "and they come back"


def test_who_drops_out_is_replaced_at_once_as_long_as_others_are_there():
    result = run(12, faults={"dropout": 0.3}, cohort={"size": 3})
    assert result.status == "done"
    for row in result.history:
        assert len(row.clients) == 3
        for attempt in range(1, row.attempt):
            assert len(struck(result, replace(row, attempt=attempt))) > 8 - 3, "or it was not given up"
    assert result.faults.counts["dropout"] > 10


def test_a_late_update_comes_after_the_deadline_is_answered_late_and_never_counted(steps: Any):
    result = run(12, faults={"straggler": 0.2}, cohort={"size": 8, "quorum": 4})
    assert result.status == "done"
    last = OrderId("train", 12, result.history[-1].attempt)
    late = [strike for strike in result.faults.strikes if strike.order != last]
    assert len(late) > 10
    assert sum(row.refused for row in result.history) == len(late)
    for row in result.history:
        assert not struck(result, row) & set(row.clients)
    events = [event for event, _ in steps]
    for strike in late:
        arrived = Arrived(strike.client, strike.order)
        assert events.count(arrived) == 1
        assert events.index(DeadlinePassed(strike.order, "open")) < events.index(arrived)
        ((answer,),) = [effects for event, effects in steps if event == arrived]
        assert isinstance(answer, Reject)
        assert answer.refusal.code == RefusalCode.LATE


def test_with_enough_asked_in_excess_nobody_waits_for_those_who_are_late(steps: Any):
    result = run(faults={"straggler": 0.1})
    assert result.faults.counts["straggler"] > 0
    assert {len(row.clients) for row in result.history} == {4}
    assert not [event for event, _ in steps if isinstance(event, DeadlinePassed)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_corrupt_update_costs_what_a_failed_task_costs_to_the_bit(strategy: str, steps: Any):
    tables = {"strategy": {"name": strategy}, "evaluation": {"every": 1}}
    failed = run(12, faults={"failure": 0.25}, **tables)
    steps.clear()
    corrupted = run(12, faults={"corruption": 0.25}, **tables)
    assert corrupted.faults.counts["corruption"] == failed.faults.counts["failure"] > 5
    assert bits(corrupted) == bits(failed)
    assert timeless(corrupted) == timeless(failed)
    assert np.isfinite(corrupted.model.vector).all()
    reasons = {(event.order.kind, event.refusal.code) for event, _ in steps if isinstance(event, Failed)}
    assert {code for kind, code in reasons if kind != "evaluate"} == {RefusalCode.NOT_FINITE}
    assert {code for kind, code in reasons if kind == "evaluate"} <= {RefusalCode.BAD_METRICS}


def test_failures_beyond_the_quorum_end_the_run_with_its_reason_and_the_last_committed_model():
    faults = {"failure": 0.6}
    cohort = {"size": 4, "quorum": 3, "over_select": 1.5, "attempts": 1}
    result = run(50, faults=faults, cohort=cohort)
    committed = len(result.history)
    assert result.status == "failed"
    assert 1 <= committed < 50
    assert result.reason.startswith(f"round {committed + 1}: ")
    assert "task_failed: a fault that the simulation injected" in result.reason
    assert bits(result) == bits(run(committed, faults=faults, cohort=cohort))


@pytest.mark.parametrize("fault", ["dropout", "straggler"])
def test_a_round_that_nobody_answers_is_tried_again_and_then_the_run_fails(fault: str):
    result = run(faults={fault: 1.0})
    assert (result.status, result.history) == ("failed", ())
    assert result.reason == "round 1: 0 of at least 3 updates after 600 s"
    assert {strike.order.attempt for strike in result.faults.strikes} == {1, 2, 3}


# The coordinator.


@pytest.mark.parametrize("strategy", ["fedavg", "mirrored_sgd"])
@pytest.mark.parametrize("faults", [{}, dict.fromkeys(UNTIMED, 0.15)], ids=["alone", "among faults"])
def test_wherever_the_coordinator_crashes_the_run_is_the_same_to_the_bit(strategy: str, faults: Any):
    tables = {
        "strategy": {"name": strategy, **({"optimizer": "adam"} if strategy == "mirrored_sgd" else {})},
        "evaluation": {"every": 2},
    }
    expected = run(3, faults=faults, **tables)
    events = run(3, faults=faults | {"crash_every": 1}, **tables).faults.crashes
    assert events > 15
    for every in range(1, events + 1):  # so that each event is once the first at which it crashes
        found = run(3, faults=faults | {"crash_every": every}, **tables)
        assert bits(found) == bits(expected), every
        assert timeless(found) == timeless(expected), every
        assert found.faults.strikes == expected.faults.strikes, every
        assert found.faults.crashes == events // every
        assert (found.status, found.reason) == (expected.status, expected.reason)


def test_a_strategy_whose_state_would_not_outlive_a_crash_is_found_out(monkeypatch: pytest.MonkeyPatch):
    @dataclass(frozen=True)
    class Forgetful:
        model: Array
        seen: set[int]

    real = Learning.begin

    def begin(*arguments: Any) -> Learning:
        learning = real(*arguments)
        return replace(learning, state=Forgetful(learning.state.model, {1, 2}))

    monkeypatch.setattr(Learning, "begin", begin)
    with pytest.raises(ConfigError, match=r"state\.seen: .* so that a run outlives a crash; found set"):
        run(faults={"crash_every": 1})


# Any faults.


def by_hand(made: RunConfig, rows: tuple[Row, ...]) -> bytes:
    """The model that the updates of just those clients make, who are in a history's rows."""
    learning = Learning.begin(load_strategy(made), framework.initial_model(TASK, seed=5))
    trainer = Trainer(TASK, seed=5)
    for row in rows:
        order, model = OrderId("train", row.round, row.attempt), learning.model.vector.copy()
        for client in row.clients:
            out = np.empty_like(model)
            train = data(Site(client, index=int(client.partition("-")[2])))[0]
            seed = work_seed(5, site=client, kind="train", round=row.round)
            done = trainer.train(model, train, made.work, seed=seed, out=out)
            learning = learning.fold(order, Update(client, out, done.num_examples, done.metrics))
        learning, _ = learning.close(order)
    return learning.model.vector.tobytes()


PROBABILITY = st.sampled_from([0.0, 0.05, 0.2])


@settings(max_examples=40, deadline=None)
@given(
    faults=st.fixed_dictionaries({**dict.fromkeys(UNTIMED, PROBABILITY), "crash_every": st.integers(0, 9)}),
    size=st.integers(1, 6),
    spare=st.integers(0, 2),
    over_select=st.sampled_from([1.0, 1.5]),
    every=st.integers(0, 2),
)
def test_the_model_is_made_of_the_updates_that_the_rows_name_and_of_nothing_else(
    faults: dict[str, Any], size: int, spare: int, over_select: float, every: int
):
    cohort = {"size": size, "quorum": max(1, size - 1), "over_select": over_select, "attempts": 2}
    made = config(4, size + spare, faults, cohort=cohort, evaluation={"every": every})
    result = simulate(made, task=TASK, engine="loop")
    assert result.status in ("done", "failed"), "every wait has an end"
    assert (result.status == "done") == (len(result.history) == 4)
    assert bits(result) == by_hand(made, result.history)
    for row in result.history:
        assert made.cohort.needed <= len(row.clients) <= size
        assert not struck(result, row) & set(row.clients)


@settings(max_examples=25, deadline=None)
@given(
    faults=st.fixed_dictionaries({**dict.fromkeys(UNTIMED, PROBABILITY), "crash_every": st.integers(0, 9)}),
    clients=st.integers(1, 5),
    bound=st.sampled_from([0, 2, 16]),
    every=st.integers(0, 3),
)
def test_without_rounds_faults_make_gradients_fewer_or_staler_but_never_too_stale(
    faults: dict[str, Any], clients: int, bound: int, every: int
):
    cohort, strategy = {"size": 1, "attempts": 5}, {"name": "sgd", "max_staleness": bound}
    result = run(12, clients, faults, cohort=cohort, strategy=strategy, evaluation={"every": every})
    assert all(row.staleness <= bound for row in result.history)
    if result.status == "done":
        assert len(result.history) == 12
    else:
        assert result.reason.startswith("every client failed"), "all at once; nothing else ends such a run"


@pytest.mark.parametrize("fault", ["dropout", "straggler"])
def test_without_rounds_a_client_whose_fault_is_over_works_on(fault: str):
    result = run(6, 3, {fault: 1.0}, cohort={"size": 1}, strategy={"name": "sgd"})
    assert (result.status, len(result.history)) == ("done", 6)
    assert result.faults.counts[fault] >= 6


def test_without_rounds_a_late_gradient_comes_when_it_is_too_stale_to_count(steps: Any):
    strategy = {"name": "sgd", "max_staleness": 2}
    result = run(40, 4, {"straggler": 0.2}, cohort={"size": 1}, strategy=strategy)
    late = [strike for strike in result.faults.strikes if strike.order.round < 38]
    assert len(late) > 5
    for strike in late:
        ((reject, *_),) = [
            effects for event, effects in steps if event == Arrived(strike.client, strike.order)
        ]
        assert isinstance(reject, Reject)
        assert reject.refusal.code == RefusalCode.STALE


def test_nothing_comes_over_a_broken_link(steps: Any):
    """Without rounds, a client may have two orders when its link breaks: a gradient and an evaluation."""
    tables = {"strategy": {"name": "sgd"}, "evaluation": {"every": 1, "clients": 4}}
    result = run(20, 4, {"dropout": 0.3}, cohort={"size": 1}, **tables)
    assert {strike.order.kind for strike in result.faults.strikes} == {"gradient", "evaluate"}
    gone: set[str] = set()
    for event, _ in steps:
        match event:
            case Left(client):
                gone.add(client)
            case Joined(client):
                gone.remove(client)
            case Arrived(client, _) | Failed(client, _, _):
                assert client not in gone


def test_without_rounds_a_crash_costs_what_was_under_way_and_nothing_more(steps: Any):
    result = run(30, 4, {"crash_every": 5}, cohort={"size": 1}, strategy={"name": "sgd"})
    assert (result.status, len(result.history)) == ("done", 30)
    answers = [effects[0].refusal.code for _, effects in steps if effects and isinstance(effects[0], Reject)]
    assert set(answers) == {RefusalCode.NOT_ASKED}, "for what had come to the coordinator that died"
    assert len(answers) <= result.faults.crashes


def test_what_was_injected_is_counted_in_the_summary():
    result = run(faults=EVERYTHING | {"crash_every": 5})
    counts = result.summary()["faults"]
    assert list(counts) == [*FAULTS, "crash"]
    assert all(counts[fault] for fault in [*UNTIMED, "crash"])
    assert sum(counts.values()) == len(result.faults.strikes) + result.faults.crashes


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_a_crash_changes_nothing_where_all_updates_are_looked_at_together(aggregation: str):
    strategy = {"name": "fedavg", "aggregation": aggregation, "trim": 0.2}
    plain = run(5, 20, strategy=strategy, cohort={"size": 20})
    crashed = run(5, 20, {"crash_every": 13}, strategy=strategy, cohort={"size": 20})
    assert crashed.faults.crashes > 5
    assert np.array_equal(plain.model.vector, crashed.model.vector)
    mean = run(5, 20, cohort={"size": 20})
    assert not np.array_equal(plain.model.vector, mean.model.vector)
    assert np.allclose(plain.model.vector, mean.model.vector, atol=0.2)


def test_an_update_that_comes_twice_counts_once(steps: Any):
    twice, once = run(4, 6, {"duplicate": 1.0}), run(4, 6)
    assert bits(twice) == bits(once)
    codes = [reject.refusal.code for _, effects in steps for reject in effects if isinstance(reject, Reject)]
    assert set(codes) <= {RefusalCode.DUPLICATE, RefusalCode.LATE, RefusalCode.RUN_ENDED}
    assert RefusalCode.DUPLICATE in codes
    assert sum(row.refused for row in twice.history) > 0 == sum(row.refused for row in once.history)


def test_a_delay_is_for_virtual_time():
    with pytest.raises(ConfigError, match=r"faults\.delay: expected virtual time"):
        run(faults={"delay": 0.5})


def test_a_delayed_update_counts_if_its_round_is_still_open():
    def timed(**faults: float) -> Result:
        simulation = {"clients": 6, "devices": {}, "faults": faults}
        cohort = {"size": 4, "deadline_s": 1e6}
        return simulate(config(4, 6, simulation=simulation, cohort=cohort), task=TASK)

    late, plain = timed(delay=0.5, delay_s=1000.0), timed()
    assert bits(late) == bits(plain), "the deadline is far, and everybody is waited for"
    assert late.faults.counts["delay"] >= 4
    assert late.moments[-1].virtual_s > 1000 > plain.moments[-1].virtual_s
