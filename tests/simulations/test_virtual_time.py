"""Virtual time: what happens when, on what devices, and what the round machine makes of it."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated
from hypothesis import given
from hypothesis import strategies as st

from fedge import RunConfig, Site
from fedge.errors import ConfigError, RunError
from fedge.events import OrderId, Send
from fedge.simulation import AvailabilityConfig, DevicesConfig
from fedge_client.torch.trainer import Trainer
from fedge_sim import Result, simulate
from fedge_sim.driver import Driver
from fedge_sim.virtual.availability import DAY, HOUR, availability_of
from fedge_sim.virtual.clock import Came, Clock, Finished, Went
from fedge_sim.virtual.devices import Course, Device, Devices, Load

NAMES = [f"client-{index}" for index in range(8)]
EVEN = {"compute": 10.0, "down_mbps": 1.0, "up_mbps": 1.0}
SPREAD = {"compute": {"median": 2.0, "sigma": 0.8}, "up_mbps": {"low": 0.01, "high": 0.1}, "dropout": 0.1}


def run(engine: Any = "loop", *, simulation: dict[str, Any], **tables: Any) -> Result:
    table = {
        "name": "trial",
        "task": "simulated:task",
        "rounds": 5,
        "seed": 5,
        "work": {"epochs": 1, "batch_size": 4, "learning_rate": 0.05},
        "cohort": {"size": 6},
        "simulation": {"clients": 8, **simulation},
        **tables,
    }
    return simulate(RunConfig.from_table(table, source="run"), engine=engine)


def send(client: str, round: int = 1) -> Send:
    return Send(client, OrderId("train", round))


def clock(
    devices: dict[str, Any] | None = None,
    availability: dict[str, Any] | None = None,
    *,
    limit_s: float = 1000 * HOUR,
    seed: int = 1,
) -> Clock:
    made = DevicesConfig(**devices) if devices is not None else None
    return Clock(
        NAMES,
        availability_of(
            AvailabilityConfig(**(availability or {})), NAMES, seed=seed, folder=None, limit_s=limit_s
        ),
        Devices(made, NAMES, seed=seed, folder=None) if made is not None else None,
        limit_s=limit_s,
        absence_s=60.0,
        seed=seed,
    )


# Devices.


def test_an_order_takes_as_long_as_its_bytes_and_examples_do():
    device = Device(50.0, 8e6, 4e6, 0.5, math.inf, 10.0, 2.0, 0.0)
    course = Course.of(device, Load(down=2_000_000, up=1_000_000, examples=200))
    assert (course.fetch_s, course.compute_s, course.deliver_s) == (2.5, 4.0, 2.5)
    assert course.seconds == 9.0
    assert [course.joules(at) for at in (0.0, 1.0, 2.5, 3.5, 9.0, 99.0)] == [0, 2, 5, 15, 50, 50]


def test_devices_are_as_spread_as_they_are_said_to_be():
    names = [f"client-{index:04d}" for index in range(2000)]
    config = DevicesConfig(
        compute={"median": 100.0, "sigma": 0.5},  # type: ignore[arg-type]  # as TOML has it
        up_mbps={"low": 1.0, "high": 3.0},  # type: ignore[arg-type]
        down_mbps={"values": [10.0, 20.0]},  # type: ignore[arg-type]
    )
    devices = [Devices(config, names, seed=1, folder=None).of(name) for name in names]
    logs = np.log([each.compute for each in devices])
    assert abs(float(np.median(logs)) - math.log(100)) < 0.05
    assert abs(float(logs.std()) - 0.5) < 0.03
    ups = [each.up / 1e6 for each in devices]
    assert 1.0 <= min(ups) < 1.05 < 2.95 < max(ups) <= 3.0
    assert {each.down for each in devices} == {1e7, 2e7}
    assert devices == [Devices(config, names, seed=1, folder=None).of(name) for name in names]
    assert devices != [Devices(config, names, seed=2, folder=None).of(name) for name in names]


def test_a_trace_of_devices_gives_each_client_a_row(tmp_path: Path):
    (tmp_path / "devices.csv").write_text("compute,dropout\n" + "".join(f"{i + 1},0.5\n" for i in range(8)))
    config = DevicesConfig(trace="devices.csv", up_mbps=7.0)  # type: ignore[arg-type]
    devices = Devices(config, NAMES, seed=1, folder=tmp_path)
    assert [devices.of(name).compute for name in NAMES] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {(devices.of(name).up, devices.of(name).dropout) for name in NAMES} == {(7e6, 0.5)}
    more = [f"client-{index:02d}" for index in range(50)]
    dealt = Devices(config, more, seed=1, folder=tmp_path)
    assert {dealt.of(name).compute for name in more} == {1, 2, 3, 4, 5, 6, 7, 8}


# Availability.


def first(kind: dict[str, Any], client: str = "client-3", *, seed: int = 1, count: int = 200) -> list[Any]:
    intervals = availability_of(AvailabilityConfig(**kind), NAMES, seed=seed, folder=None, limit_s=400 * DAY)
    return list(islice(intervals(client), count))


@given(
    kind=st.sampled_from(["always", "markov", "diurnal", "charging"]),
    seed=st.integers(0, 99),
    start=st.floats(0, 23.9),
)
def test_a_clients_intervals_follow_each_other(kind: str, seed: int, start: float):
    intervals = first({"kind": kind, "start_hour": start}, seed=seed, count=50)
    assert all(0 <= begin < end for begin, end in intervals)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(intervals))
    assert intervals == first({"kind": kind, "start_hour": start}, seed=seed, count=50)


def share(intervals: list[Any]) -> float:
    return float(sum(end - begin for begin, end in intervals) / intervals[-1][1])


def test_clients_are_there_for_as_long_as_they_are_said_to_be():
    markov = [share(first({"kind": "markov", "online_s": 600, "offline_s": 1800}, name)) for name in NAMES]
    assert abs(float(np.mean(markov)) - 0.25) < 0.03
    diurnal = [
        share(first({"kind": "diurnal", "least": 0.2, "most": 0.6}, name, count=2000)) for name in NAMES
    ]
    assert abs(float(np.mean(diurnal)) - 0.4) < 0.03


def test_more_are_there_at_the_peak():
    intervals = [
        each for name in NAMES for each in first({"kind": "diurnal", "peak_hour": 3.0}, name, count=1000)
    ]
    hours = np.array([(begin / HOUR) % 24 for begin, _ in intervals])
    assert (hours == 3.0).sum() > 5 * (hours == 15.0).sum()


def test_phones_charge_at_night():
    kind = {"kind": "charging", "from_hour": 22.0, "to_hour": 6.0, "jitter_hours": 1.0, "most": 1.0}
    intervals = first(kind | {"start_hour": 12.0})
    assert len(intervals) == 200
    for begin, end in intervals:
        assert 21 <= (begin / HOUR + 12) % 24 <= 23
        assert 5 <= (end / HOUR + 12) % 24 <= 7
    assert first(kind | {"start_hour": 0.0})[0][0] == 0.0, "the night before is not over"


def test_a_trace_is_repeated(tmp_path: Path):
    rows = "".join(f"{client},{client},{client + 2}\n" for client in range(8))
    (tmp_path / "there.csv").write_text("client,from_s,to_s\n" + rows)
    config = AvailabilityConfig(kind="trace", trace="there.csv", period_s=10.0)
    intervals = availability_of(config, NAMES, seed=1, folder=tmp_path, limit_s=25.0)
    assert list(intervals("client-3")) == [(3, 5), (13, 15), (23, 25)]


# The event queue.


@given(
    st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1e6), st.booleans()), max_size=30),
    st.integers(0, 20),
)
def test_time_goes_on_and_what_was_stopped_does_not_happen(orders: list[Any], seed: int):
    time = clock(SPREAD, seed=seed)
    stopped = set()
    for round, (client, _, keeps) in enumerate(orders, start=1):
        order = send(NAMES[client], round)
        time.give(order, Load(1000, 1000, 10), 0)
        if not keeps:
            time.stop(order, wasted=True)
            stopped.add(order)
    before, finished = 0.0, []
    due = {order: work.since_s + work.course.seconds for order, work in time._begun.items()}
    while True:
        try:
            what = time.next()
        except RunError:
            break
        assert time.now_s >= before
        before = time.now_s
        if isinstance(what, Finished):
            finished.append(what.send)
            assert time.now_s == pytest.approx(due[what.send])
            time.stop(what.send, wasted=False)
        elif isinstance(what, Went):
            for each in [send(what.client, round) for round in range(1, len(orders) + 1)]:
                time.stop(each, wasted=True)
    assert not stopped & set(finished)
    assert time.present == frozenset(NAMES), "all who were lost are back"


def test_intervals_that_touch_are_one_to_everybody_else():
    time = clock(availability={"kind": "diurnal", "least": 1.0, "most": 1.0}, limit_s=30 * HOUR)
    assert time.present == frozenset(NAMES)
    with pytest.raises(RunError, match="nothing more happens within 30 hours"):
        time.next()


def test_a_client_that_was_lost_comes_back():
    time = clock({"dropout": 1.0})
    time.give(send("client-2"), Load(0, 0, 1000), 0)
    assert not time.comes_to_something(send("client-2"))
    assert time.next() == Went("client-2")
    assert "client-2" not in time.present
    time.stop(send("client-2"), wasted=True)
    assert 0 < time.joules < 5
    assert time.next() == Came("client-2")


def test_an_order_that_is_given_again_takes_as_long_again():
    """A client goes, and is given the same order when it is back: what was begun before ends nothing."""
    time = clock({"compute": 1.0, "latency_ms": 1e-6})
    order, load = send("client-1"), Load(0, 0, 100)
    time.give(order, load, 0)
    time.give(send("client-2"), Load(0, 0, 50), 0)
    assert time.next() == Finished(send("client-2"))
    time.stop(order, wasted=True)
    time.give(order, load, 0)
    assert time.next() == Finished(order)
    assert time.now_s == pytest.approx(150.0)


def test_a_client_that_was_lost_at_an_order_need_not_be_when_it_is_given_again():
    time = clock({"dropout": 0.5})
    outcomes = []
    for _ in range(60):
        time.give(send("client-3"), Load(0, 0, 10), 0)
        lost = isinstance(time.next(), Went)
        time.stop(send("client-3"), wasted=True)
        outcomes.append(lost)
        if lost:
            assert time.next() == Came("client-3")
    assert 15 < sum(outcomes) < 45


# The run.


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
    simulation = {"devices": SPREAD, "availability": {"kind": "markov", "online_s": 90, "offline_s": 30}}
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
        cohort={"size": 6, "quorum": 2, "attempts": 20},
        rounds=2,
    )
    assert found.history[0].refused > 0
    nobody = run(simulation={"devices": {"memory_mb": 0.0005}}, cohort={"size": 6})
    assert (nobody.status, nobody.history) == ("failed", ())


def test_a_coordinator_that_crashes_loses_nothing_in_virtual_time():
    simulation = {"devices": SPREAD}
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
        ("devices", "compute\nfast\n", "line 2: compute: expected a number, found 'fast'"),
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
        ('[{"compute": null}]', "a number, found 'None'"),
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
        ({"devices": {"speed": 1.0}}, "unknown key 'simulation.devices.speed'"),
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
