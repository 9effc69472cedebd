"""Runs in virtual time: what the round machine makes of who is slow, lost or away."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated
from simulated import SPREAD_DEVICES, config

from fedge import Site
from fedge.errors import ConfigError
from fedge_client.torch.trainer import Trainer
from fedge_sim import Result, simulate
from fedge_sim.driver import Driver

NAMES = [f"client-{index}" for index in range(8)]
EVEN = {"compute": 10.0, "down_mbps": 1.0, "up_mbps": 1.0}


WORK = {"epochs": 1, "batch_size": 4, "learning_rate": 0.05}


def run(engine: Any = "loop", *, simulation: dict[str, Any], **tables: Any) -> Result:
    table = {"rounds": 5, "work": WORK, "simulation": {"clients": 8, **simulation}} | tables
    return simulate(config(**table), engine=engine)


def test_virtual_time_changes_nothing_but_when():
    """All devices are alike and nobody is left out: the same updates, whose sum has no order."""
    timed, plain = run(simulation={"devices": EVEN}), run(simulation={})
    assert np.array_equal(timed.model.vector, plain.model.vector)
    assert [row.clients for row in timed.history] == [row.clients for row in plain.history]
    times = [moment.virtual_s for moment in timed.moments]
    assert all(later > earlier for earlier, later in pairwise([0.0, *times]))
    assert plain.moments == ()


@pytest.mark.parametrize(
    "tables", [{}, {"strategy": {"name": "sgd", "max_staleness": 4}}], ids=["fedavg", "sgd"]
)
def test_every_engine_has_the_same_time(tables: dict[str, Any]):
    simulation = {
        "devices": SPREAD_DEVICES,
        "availability": {"kind": "markov", "online_s": 90, "offline_s": 30},
    }
    cohort = {"size": 5, "quorum": 3, "over_select": 1.4, "deadline_s": 40}
    looped, *others = (
        run(engine, simulation=simulation, cohort=cohort, **tables)
        for engine in ("loop", "vectorised", "processes")
    )
    assert looped.status == "done"
    for other in others:
        assert other.moments == looped.moments
        assert [row.clients for row in other.history] == [row.clients for row in looped.history]
        assert np.allclose(other.model.vector, looped.model.vector, rtol=1e-3, atol=1e-4)
    assert np.array_equal(others[1].model.vector, looped.model.vector)


def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Client 7 is a hundred times slower than the others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.csv").write_text("compute\n" + "100\n" * 7 + "1\n")
    return {"devices": {"trace": "devices.csv"}}


def test_over_selection_leaves_a_slow_client_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    simulation = slow(tmp_path, monkeypatch)
    whole = run(simulation=simulation, cohort={"size": 8})
    fast = run(simulation=simulation, cohort={"size": 6, "over_select": 1.34})
    assert all("client-7" in row.clients for row in whole.history)
    assert not any("client-7" in row.clients for row in fast.history)
    assert fast.moments[-1].virtual_s < whole.moments[-1].virtual_s / 5
    assert fast.moments[-1].wasted > 0 == whole.moments[-1].wasted


def test_a_client_that_goes_on_is_waited_for_past_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a deployment, where clients say how far they are; not for ever."""
    simulation = slow(tmp_path, monkeypatch)
    found = run(simulation=simulation, cohort={"size": 8, "deadline_s": 10.0}, rounds=1)
    assert found.status == "done"
    assert found.moments[0].virtual_s > 25.0, "client 7 has 25 examples"


def test_without_rounds_the_fast_contribute_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = run(
        simulation=slow(tmp_path, monkeypatch),
        strategy={"name": "sgd", "max_staleness": 1000},
        cohort={"size": 8},
        rounds=800,
    )
    turns = [sum(name in row.clients for row in found.history) for name in ("client-0", "client-7")]
    assert turns[0] > 3 * turns[1] > 0
    assert max(row.staleness for row in found.history) > 5


def test_an_order_that_does_not_fit_in_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.json").write_text('[{"memory_mb": 1}, {"memory_mb": 0.0005}]')
    found = run(
        simulation={"devices": {"trace": "devices.json"}},
        cohort={"size": 8, "quorum": 2, "attempts": 20},
        rounds=2,
    )
    assert found.history[0].refused > 0
    nobody = run(simulation={"devices": {"memory_mb": 0.0005}}, cohort={"size": 6})
    assert (nobody.status, nobody.history) == ("failed", ())


def test_a_coordinator_that_crashes_loses_nothing_in_virtual_time():
    simulation = {"devices": SPREAD_DEVICES}
    cohort = {"size": 5, "quorum": 3, "over_select": 1.4, "deadline_s": 40, "attempts": 20}
    crashing = run(simulation=simulation | {"faults": {"crash_every": 7}}, cohort=cohort)
    assert crashing.status == "done"
    assert crashing.faults.crashes > 3
    assert len(crashing.history) == 5


@pytest.mark.parametrize(
    "tables", [{}, {"strategy": {"name": "sgd", "max_staleness": 5}}], ids=["fedavg", "sgd"]
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_who_stands_still_past_a_deadline_works_from_then_on(tables: dict[str, Any], seed: int):
    devices = {"compute": 1, "down_mbps": 1, "up_mbps": 1}
    found = run(
        simulation={"devices": devices, "faults": {"straggler": 0.3}},
        cohort={"size": 6, "quorum": 6, "deadline_s": 5},
        seed=seed,
        **tables,
    )
    assert found.status in ("done", "failed")
    assert found.faults.counts["straggler"] > 0


@pytest.mark.parametrize("dropout", [0.3, 0.6])
def test_devices_that_are_lost_now_and_then_come_to_an_end_of_their_work(dropout: float):
    devices = {"compute": 0.5, "dropout": dropout, "absence_s": 5}
    found = run(simulation={"devices": devices}, cohort={"size": 6, "deadline_s": 600}, rounds=3)
    assert found.status == "done"
    assert found.moments[-1].wasted < 200


@pytest.mark.parametrize("seed", range(6))
def test_nobody_who_is_gone_contributes_though_the_coordinator_crashes(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    present: list[bool] = []
    real = Driver._fold

    def fold(self: Driver, client: str, *arguments: Any) -> None:
        assert self._clock is not None
        present.append(client in self._clock.present)
        real(self, client, *arguments)

    monkeypatch.setattr(Driver, "_fold", fold)
    availability = {"kind": "markov", "online_s": 15, "offline_s": 5}
    found = run(
        simulation={"devices": {"compute": 5}, "availability": availability, "faults": {"crash_every": 5}},
        cohort={"size": 4, "quorum": 2, "deadline_s": 30, "attempts": 50},
        rounds=10,
        seed=700 + seed,
    )
    assert found.faults.crashes > 3
    assert present
    assert all(present)


def test_without_rounds_who_works_on_an_older_model_is_seen_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The fast client leaves; the slow one needs three deadlines for its step, and is not begun anew at each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.csv").write_text("compute\n10\n0.02\n")
    (tmp_path / "there.csv").write_text("client,from_s,to_s\n0,0,3\n1,0,1e6\n")
    found = run(
        simulation={
            "clients": 2,
            "devices": {"trace": "devices.csv"},
            "availability": {"kind": "trace", "trace": "there.csv"},
        },
        strategy={"name": "sgd", "max_staleness": 100},
        cohort={"size": 1, "deadline_s": 60},
        rounds=30,
    )
    assert found.status == "done"
    slow = next(
        moment.virtual_s
        for row, moment in zip(found.history, found.moments, strict=True)
        if row.staleness > 3
    )
    assert slow == pytest.approx(200.0, abs=1.0)


@pytest.mark.parametrize("crash_every", [3, 5, 7])
def test_an_evaluation_that_is_begun_anew_after_a_crash_is_of_its_own_clients_alone(crash_every: int):
    tables = {
        "strategy": {"name": "sgd", "max_staleness": 8},
        "evaluation": {"every": 3},
        "rounds": 30,
    }
    crashing = run(simulation={"faults": {"crash_every": crash_every}}, **tables)
    for row, seen in zip(crashing.history, crashing.seen, strict=True):
        for name, (low, high) in seen.tenths.items():
            assert low - 1e-6 <= row.metrics[name] <= high + 1e-6
    last = crashing.model
    judged = [
        Trainer(simulated.task, seed=5).evaluate(last.vector, data(name)[1]).metrics["loss"] for name in NAMES
    ]
    low, high = crashing.seen[-1].tenths["loss"]
    assert min(judged) - 1e-4 <= low <= high <= max(judged) + 1e-4


def data(name: str) -> Any:
    return simulated.data(Site(name, index=int(name[-1]), count=8))


def test_a_run_that_can_never_go_on_ends_and_says_why():
    found = run(
        simulation={"availability": {"kind": "diurnal", "least": 0, "most": 0}, "time_limit_hours": 2.5}
    )
    assert found.status == "failed"
    assert "0 of at least 6 clients after 3600 s" in found.reason
    endless = run(
        simulation={"devices": {"compute": 1e-6}, "time_limit_hours": 1.0},
        cohort={"size": 6, "deadline_s": 1e9},
    )
    assert endless.status == "failed"
    assert (
        "nothing more happens within 1 hours of virtual time (simulation.time_limit_hours)" in endless.reason
    )


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("devices", "", "expected devices, a row each, found none"),
        ("devices", "compute,compute\n1,2\n", "a header of different names"),
        ("devices", "compute\n1\n1,2\n", "line 3: expected 1 cells, found 2"),
        ("devices", "compute\nfast\n", "line 2: compute: expected a finite number, found 'fast'"),
        ("devices", "compute\nnan\n", "line 2: compute: expected a finite number"),
        ("devices", "compute\n-1\n", "device 1: compute: expected a number above 0"),
        ("devices", "dropout\n1.5\n", "device 1: dropout: expected a chance from 0 to 1, found 1.5"),
        ("devices", "cores\n4\n", "device 1: expected some of compute, .*found cores"),
        ("devices", b"\xff\xfe\x00", "expected devices as CSV"),
        (
            "trace",
            "client,from_s\n0,1\n",
            "interval 1: expected client, from_s and to_s, found client, from_s",
        ),
        ("trace", "client,from_s,to_s\n8,0,1\n", "client: expected an index from 0 to 7, found 8"),
        ("trace", "client,from_s,to_s\n0,5,5\n", "expected 0 <= from_s < to_s, found 5 and 5"),
        ("trace", "client,from_s,to_s\n0,5,50\n", "to_s: expected at most the period of 10 s, found 50"),
        ("trace", "client,from_s,to_s\n0,0,2\n0,3,4\n", "found none of client 1: the trace has a hole there"),
        (
            "trace",
            "client,from_s,to_s\n" + "".join(f"{at},0,2\n{at},1,3\n" for at in range(8)),
            "client 0: expected intervals that do not overlap, found one from 1 s before the one until 2 s is over",
        ),
    ],
)
def test_traces_that_make_no_sense_are_refused(
    kind: str, text: str | bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    table: dict[str, Any] = {"devices": {"trace": "trace.csv"}}
    if kind == "trace":
        table = {"availability": {"kind": "trace", "trace": "trace.csv", "period_s": 10.0}}
    with pytest.raises(ConfigError, match=says):
        run(simulation=table)


def test_numbers_and_names_that_nobody_would_write_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.json").write_text('[{"compute": ' + "9" * 5000 + "}]")
    with pytest.raises(ConfigError, match="expected devices as CSV, or as JSON"):
        run(simulation={"devices": {"trace": "trace.json"}})
    with pytest.raises(ConfigError, match="expected the name of a file"):
        run(simulation={"devices": {"trace": "a\0b"}})
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        run(simulation={"availability": {"kind": "trace", "trace": "t.csv", "period_s": 0.001}})


def test_json_that_is_no_list_of_objects_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for text, says in [
        ("[1]", "a list of objects"),
        ("{", "as JSON"),
        ('[{"compute": null}]', "a finite number, found 'None'"),
    ]:
        (tmp_path / "trace.json").write_text(text)
        with pytest.raises(ConfigError, match=says):
            run(simulation={"devices": {"trace": "trace.json"}})


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            {"devices": {"compute": "fast"}},
            "compute: expected a number, or a table of how it is spread, found 'fast'",
        ),
        ({"devices": {"compute": {"median": 3.0}}}, "of median and sigma.* found median"),
        ({"devices": {"compute": {"low": 3.0, "high": 2.0}}}, "low to be at most high, found 3 and 2"),
        ({"devices": {"compute": {}}}, "found an empty table"),
        ({"devices": {"compute": 0.0}}, "greater than 0"),
        ({"devices": {"computes": 1.0}}, "unknown key 'simulation.devices.computes'; did you mean 'compute'"),
        ({"devices": {"memory_mb": {"lows": 1.0}}}, "memory_mb.lows'; did you mean 'low'"),
        ({"availability": {"kind": "trace"}}, 'trace: expected a file with kind = "trace"'),
        (
            {"availability": {"kind": "markov", "period_s": 1.0}},
            'period_s: expected it with kind = "trace" alone',
        ),
        ({"availability": {"least": 0.95}}, "least: expected at most 0.9"),
        (
            {"availability": {"kind": "charging", "from_hour": 1.0, "to_hour": 2.0}},
            "jitter_hours: expected less",
        ),
        ({"availability": {"kind": "charging", "from_hour": 1.0, "to_hour": 0.0}}, "nights that end before"),
    ],
)
def test_settings_that_make_no_sense_are_refused(table: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        run(simulation=table)
