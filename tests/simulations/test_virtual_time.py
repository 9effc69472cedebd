"""Virtual time: what devices are like, when clients are there, and what happens when."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import SPREAD_DEVICES

from fedge.errors import RunError
from fedge.events import Joined, Left, OrderId, Send
from fedge.simulation import AvailabilityConfig, DevicesConfig
from fedge_sim.virtual.availability import DAY, HOUR, availability_of
from fedge_sim.virtual.clock import Clock, Finished
from fedge_sim.virtual.devices import Course, Device, Devices, Load

NAMES = [f"client-{index}" for index in range(8)]


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
    time = clock(SPREAD_DEVICES, seed=seed)
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
        elif isinstance(what, Left):
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
    assert time.next() == Left("client-2")
    assert "client-2" not in time.present
    time.stop(send("client-2"), wasted=True)
    assert 0 < time.joules < 5
    assert time.next() == Joined("client-2")


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
        lost = isinstance(time.next(), Left)
        time.stop(send("client-3"), wasted=True)
        outcomes.append(lost)
        if lost:
            assert time.next() == Joined("client-3")
    assert 15 < sum(outcomes) < 45
