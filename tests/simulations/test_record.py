"""What a simulation notes down beside its rows: the spread over clients, privacy by round, classes, virtual time."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import pytest
import simulated
from hypothesis import given
from hypothesis import strategies as st

from fedge import Task
from fedge_sim import Result, simulate
from fedge_sim.record import tenths
from fedge_sim.report import write_results


def run(task: Task = simulated.task, **tables: Any) -> Result:
    table = {"work": {"batch_size": 4}, "simulation": {"clients": 12}} | tables
    return simulate(simulated.config(**table), task=task, engine="loop")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_tenths_are_the_ends_of_what_the_clients_have(values: list[float]):
    low, high = tenths([{"loss": value} for value in values])["loss"]
    count = max(1, len(values) // 10)
    assert low == statistics.fmean(sorted(values)[:count])
    assert high == statistics.fmean(sorted(values)[-count:])
    assert low <= statistics.fmean(values) + 1e-6
    assert high >= statistics.fmean(values) - 1e-6


def test_a_metric_that_not_everybody_has_is_of_those_who_do():
    assert tenths([{"loss": 1.0}, {"loss": 3.0, "f1": 0.5}]) == {"loss": (1.0, 3.0), "f1": (0.5, 0.5)}
    assert tenths([]) == {}


def test_each_evaluated_round_tells_of_its_lowest_and_highest():
    result = run(evaluation={"every": 2})
    assert [bool(seen.tenths) for seen in result.seen] == [False, True, False, True]
    for row, seen in zip(result.history, result.seen, strict=True):
        for name, (low, high) in seen.tenths.items():
            assert low <= row.metrics[name] <= high


def test_privacy_is_told_by_round_and_ends_at_what_is_stated():
    privacy = {"unit": "example", "epsilon": 20.0, "delta": 1e-3, "clip": 1.0}
    result = run(privacy=privacy)
    spent = [seen.epsilon for seen in result.seen]
    assert None not in spent
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(max(result.privacy.epsilons.values()))
    assert all(seen.epsilon is None for seen in run().seen)


def test_the_classes_of_the_first_clients_are_counted():
    result = run()
    assert list(result.labels) == [f"client-{index:02d}" for index in range(12)]
    for index, found in enumerate(result.labels.values()):
        assert sum(found.values()) == 4 + 3 * index
        assert set(found) <= {0, 1, 2}
    far = run(Task(simulated.perceptron, simulated.data, simulated.task.loss), simulation={"clients": 60})
    assert len(far.labels) == 40


def test_numbers_beside_the_rows_are_in_the_csv_and_in_the_table(tmp_path: Path):
    result = run(simulation={"clients": 12, "devices": {}})
    write_results(tmp_path, result)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "history.csv").read_text())))
    assert [float(row["virtual_s"]) for row in rows] == [moment.virtual_s for moment in result.moments]
    assert {"joules", "wasted", "present", "accuracy_lowest_tenth", "loss_highest_tenth"} <= rows[0].keys()
    assert result.table()[-1]["joules"] == result.moments[-1].joules
    assert result.summary()["clock"]["virtual_s"] == result.moments[-1].virtual_s
