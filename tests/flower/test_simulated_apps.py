"""Flower apps, as their authors wrote them, in fedge's simulation and in Flower's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from flower_apps import APPS, APPS_THAT_ARE_COMPARED, assert_alike, by_flower, simulated


@pytest.mark.parametrize("app", APPS_THAT_ARE_COMPARED)
def test_an_app_gives_the_results_that_it_has_in_flowers_own_simulation(app: str, tmp_path: Path):
    assert_alike(simulated(app, tmp_path, nodes=4), by_flower(app, tmp_path, nodes=4))


def test_flowers_own_secure_aggregation_comes_to_the_mean(tmp_path: Path):
    for found in (simulated("secagg", tmp_path, nodes=4), by_flower("secagg", tmp_path, nodes=4)):
        assert found == pytest.approx([1.5 * (1 - 0.5**3)] * 3, abs=0.01)


def test_what_an_app_is_run_with_changes_nothing(tmp_path: Path):
    found = [simulated("numpy_quickstart", tmp_path, nodes=5, workers=workers) for workers in (1, 3)]
    assert found[0] == found[1], "replies are in the order of the messages"
    assert found[0]["dtypes"] == ["float32", "float64"]


def test_a_legacy_client_is_called_by_many_threads_and_remembers(tmp_path: Path):
    found = simulated("legacy", tmp_path, nodes=6, **{"num-server-rounds": 3})
    assert found["fits"] == [3] * 6, "each has its own context"
    assert found["rounds"] == [3] * 6
    assert found["failures"] == 0


def test_queries_actions_mods_and_every_type_of_value_cross(tmp_path: Path):
    found = simulated("several_actions", tmp_path, nodes=3)
    assert found["partitions"] == [0, 1, 2]
    assert found["times"] == [2, 2, 2], "the state of each node is kept"
    assert found["echo"] == [{"big": 2**62, "small": -(2**62)}] * 3
    assert found["texts"] == [["a", "b"]] * 3
    assert found["bytes"] == ["00ff"] * 3
    assert found["groups"] == ["7"] * 3
    assert found["sources"] is True
    assert found["values"] == [3.0] * 3, "the mod of this action has doubled it"
    assert found["brains"] == ["4000" + "3f80"] * 3
    assert [code for code, _ in found["missing"]] == [2] * 3
    assert all(
        "No train function registered with name 'nonesuch'" in reason for _, reason in found["missing"]
    )
    assert found["pulled"] == [3]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "ValueError: a client that raises"),
        ("dies", "killed by signal 9"),
        ("exits", "exit code 3"),
        ("returns nothing", "expected the ClientApp to return a Message, found a NoneType"),
    ],
)
def test_a_client_that_fails_costs_its_own_reply_and_the_others_go_on(how: str, says: str, tmp_path: Path):
    found = simulated("unruly", tmp_path, nodes=3, how=how)
    assert found[0] == {"0": 1, "1": 1, "2": 1}
    assert says in found[1]["1"]
    # What it did before it failed is not kept: it fails again, and again.
    assert [{**row, "1": "failed"} for row in found[1:]] == [
        {"0": n, "1": "failed", "2": n} for n in (2, 3, 4)
    ]


def test_a_client_that_hangs_is_called_off_when_the_time_is_up(tmp_path: Path):
    began = time.monotonic()
    found = simulated("unruly", tmp_path, nodes=3, how="hangs", timeout=6.0)
    assert found == [{"0": 1, "1": 1, "2": 1}, *({"0": n, "2": n} for n in (2, 3, 4))]
    assert time.monotonic() - began < 120


def test_an_app_that_is_interrupted_leaves_no_process_behind(tmp_path: Path):
    command = [Path(sys.executable).with_name("fedge"), "flower", "run", APPS / "unruly", "--nodes", "3"]
    process = subprocess.Popen(
        [*command, "--run-config", 'how="hangs" timeout=3600.0'],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        children = psutil.Process(process.pid).children()
    time.sleep(2)  # one of them is at the message that never ends
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=10)[1]
