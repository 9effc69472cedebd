"""Flower apps, as their authors wrote them, on a coordinator and its sites: real processes, real mutual TLS."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flower_apps import APPS_THAT_ARE_COMPARED
from harness import Federation, Running, coordinator, fedge, fedge_ok, set_tables, until

from fedge_client.apps.installed import app_in

APPS = Path(__file__).parents[1] / "flower/apps"
NAMES = {app_in(folder)[0]: str(folder) for folder in sorted(APPS.iterdir())}


def partitions(*numbers: int, of: int, processes: int = 2) -> dict[str, Any]:
    """What a site's client.toml says of Flower apps."""
    nodes = [{"partition-id": each, "num-partitions": of} for each in numbers]
    return {"apps": NAMES, "nodes": nodes, "processes": processes}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two sites of two nodes each."""
    with coordinator(tmp_path_factory.mktemp("flower")) as federation:
        for at, name in enumerate(("hospital-a", "hospital-b")):
            federation.enrol(name, flower=partitions(2 * at, 2 * at + 1, of=4))
            federation.start(name)
        yield federation


def settings_of(report: Path, config: dict[str, Any]) -> str:
    settings = {"report.path": str(report), **config}
    return " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in settings.items())


def begun(federation: Federation, app: str, report: Path, *, nodes: int = 4, **config: Any) -> Running:
    """`fedge flower run --admin`."""
    return Running.start(
        *("flower", "run", APPS / app, "--admin", federation.admin_toml),
        *("--nodes", str(nodes), "--run-config", settings_of(report, config)),
        log=report.with_suffix(".log"),
    )


def ended(running: Running, report: Path) -> Any:
    """What an app reports that must come to its end."""
    assert running.ends() == 0, running.output
    return json.loads(report.read_text())


def on(federation: Federation, app: str, report: Path, **config: Any) -> Any:
    return ended(begun(federation, app, report, **config), report)


def simulated(app: str, report: Path, **config: Any) -> Any:
    fedge_ok("flower", "run", APPS / app, "--nodes", "4", "--run-config", settings_of(report, config))
    return json.loads(report.read_text())


def alike(one: Any, other: Any) -> bool:
    """To the tolerance of a float32 sum in another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == (pytest.approx(other, rel=1e-5, abs=1e-6) if isinstance(one, float) else other))


@pytest.mark.parametrize("app", APPS_THAT_ARE_COMPARED)
def test_an_app_gives_the_results_that_it_has_in_the_simulation(
    app: str, hospitals: Federation, tmp_path: Path
):
    found = on(hospitals, app, tmp_path / "deployed.json")
    expected = simulated(app, tmp_path / "simulated.json")
    assert alike(found, expected), (found, expected)


def test_flowers_own_secure_aggregation_comes_to_the_mean(hospitals: Federation, tmp_path: Path):
    found = on(hospitals, "secagg", tmp_path / "deployed.json")
    assert found == pytest.approx([1.5 * (1 - 0.5**3)] * 3, abs=0.01)


def test_queries_actions_mods_and_every_type_of_value_cross(hospitals: Federation, tmp_path: Path):
    found = on(hospitals, "several_actions", tmp_path / "report.json")
    assert found["partitions"] == [0, 1, 2, 3]
    assert found["times"] == [2] * 4, "the state of each node is kept"
    assert found["echo"] == [{"big": 2**62, "small": -(2**62)}] * 4
    assert found["bytes"] == ["00ff"] * 4
    assert found["values"] == [3.0] * 4, "the mod of this action has doubled it"
    assert found["brains"] == ["4000" + "3f80"] * 4, "bfloat16"
    assert found["sources"] is True
    assert found["missing"] == [[2, "ValueError; see the site's log"]] * 4
    assert found["pulled"] == [3]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "ValueError; see the site's log"),
        ("dies", "killed by signal 9"),
        ("exits", "exit code 3"),
        ("returns nothing", "TypeError; see the site's log"),
    ],
)
def test_a_client_that_fails_costs_its_own_reply_and_the_others_go_on(
    how: str, says: str, hospitals: Federation, tmp_path: Path
):
    found = on(hospitals, "unruly", tmp_path / "report.json", how=how)
    assert found[0] == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert found[1:] == [{"0": n, "1": says, "2": n, "3": n} for n in (2, 3, 4)]


def test_a_client_that_hangs_is_called_off_when_the_time_is_up(hospitals: Federation, tmp_path: Path):
    found = on(hospitals, "unruly", tmp_path / "report.json", how="hangs", timeout=3.0)
    assert found == [{"0": 1, "1": 1, "2": 1, "3": 1}, *({"0": n, "2": n, "3": n} for n in (2, 3, 4))]


def test_what_an_exception_says_stays_at_the_site(hospitals: Federation, tmp_path: Path):
    on(hospitals, "unruly", tmp_path / "report.json", how="raises")
    assert "a client that raises" in hospitals.clients["hospital-a"].output
    assert "a client that raises" not in hospitals.server.output


def test_large_arrays_cross_in_chunks(hospitals: Federation, tmp_path: Path):
    found = on(hospitals, "large", tmp_path / "report.json", elements=2_000_003)
    assert found["first"] == [5.0, 6.0, 7.0]
    assert found["last"] == [2_000_005.0, 2_000_006.0, 2_000_007.0]


def test_two_apps_run_beside_each_other(hospitals: Federation, tmp_path: Path):
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    both = [
        begun(hospitals, app, path) for app, path in zip(("legacy", "several_actions"), paths, strict=True)
    ]
    found = [ended(running, path) for running, path in zip(both, paths, strict=True)]
    assert found[0]["failures"] == 0
    assert found[1]["times"] == [2] * 4


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Federation]:
    """A federation that may be broken: one site of two nodes, and what a test adds."""
    with coordinator(tmp_path) as federation:
        federation.enrol("hospital-a", flower=partitions(0, 1, of=2))
        federation.start("hospital-a")
        yield federation


EXPECTED = [{"0": n, "1": n} for n in (1, 2, 3, 4)]


def waiting(federation: Federation, tmp_path: Path) -> tuple[Running, Path, Path]:
    """An app whose second node is in the middle of its second message, until its gate is there."""
    gate, report = tmp_path / "gate", tmp_path / "report.json"
    running = begun(federation, "unruly", report, nodes=2, how="waits", **{"gate.path": str(gate)})
    until(gate.with_suffix(".began").exists, "the second node is at work")
    return running, gate, report


def test_an_app_goes_on_when_its_coordinator_is_killed_and_comes_back(small: Federation, tmp_path: Path):
    running, gate, report = waiting(small, tmp_path)
    small.server.signal(signal.SIGKILL)
    running.says("cannot reach the coordinator")
    gate.touch()
    small = small.restarted()
    assert ended(running, report) == EXPECTED
    assert "is back" in running.output
    assert gate.with_suffix(".began").read_text() == "x", "what was under way at the site was not done twice"


def test_an_app_goes_on_when_a_site_is_killed_and_comes_back(small: Federation, tmp_path: Path):
    running, gate, report = waiting(small, tmp_path)
    small.clients["hospital-a"].signal(signal.SIGKILL)
    gate.touch()
    small.start("hospital-a")
    assert ended(running, report) == EXPECTED, "states outlive the agent, and what it was at is done again"
    assert gate.with_suffix(".began").read_text() == "xx"


def test_what_a_site_has_done_outlives_it_and_its_coordinator(small: Federation, tmp_path: Path):
    running, gate, report = waiting(small, tmp_path)
    small.server.signal(signal.SIGKILL)
    gate.touch()  # it replies, to nobody
    kept = small.folder / "hospital-a/apps"
    until(lambda: list(kept.rglob("*.reply")), "the reply is on the site's disk")
    small.clients["hospital-a"].signal(signal.SIGKILL)
    small = small.restarted()
    small.start("hospital-a")
    assert ended(running, report) == EXPECTED
    assert gate.with_suffix(".began").read_text() == "x", "it was done once"


def test_an_app_whose_own_process_is_killed_is_listed_until_it_is_stopped(small: Federation, tmp_path: Path):
    running, _, _ = waiting(small, tmp_path)
    (row,) = json.loads(fedge_ok("run", "list", "--json", "--admin", small.admin_toml))
    assert (row["status"], row["strategy"]) == ("running", "Flower app")
    running.signal(signal.SIGKILL)

    def row_now() -> dict[str, Any]:
        return dict(json.loads(fedge_ok("run", "list", "--json", "--admin", small.admin_toml))[0])

    until(lambda: row_now()["status"] == "waiting", "the coordinator has noticed")
    assert row_now()["reason"] == "its ServerApp's process is not connected"
    fedge_ok("run", "stop", row["id"], "--admin", small.admin_toml)
    small.clients["hospital-a"].says("run_ended")
    assert json.loads(fedge_ok("run", "list", "--json", "--admin", small.admin_toml)) == []
    kept = small.folder / "hospital-a/apps"
    until(lambda: not list(kept.iterdir()), "what the site had kept is gone")


def test_an_app_that_an_admin_stops_ends_with_the_reason(small: Federation, tmp_path: Path):
    running, _, _ = waiting(small, tmp_path)
    (row,) = json.loads(fedge_ok("run", "list", "--json", "--admin", small.admin_toml))
    fedge_ok("run", "stop", row["id"], "--admin", small.admin_toml)
    assert running.ends() == 1
    assert "was ended: stopped by admin admin" in running.output
    assert "Traceback" not in running.output


def test_an_app_that_is_interrupted_is_over_at_the_sites_as_well(small: Federation, tmp_path: Path):
    running, _, _ = waiting(small, tmp_path)
    assert running.signal(signal.SIGINT) == 130
    assert "Traceback" not in running.output
    small.clients["hospital-a"].says("run_ended")
    assert json.loads(fedge_ok("run", "list", "--json", "--admin", small.admin_toml)) == []
    small.clients["hospital-a"].signal(signal.SIGTERM)
    assert "stopped" in small.clients["hospital-a"].output


def test_a_site_that_refuses_in_the_middle_means_an_error_for_its_nodes(small: Federation, tmp_path: Path):
    small.enrol("hospital-b", flower=partitions(2, of=3))
    small.start("hospital-b")
    gate, report = tmp_path / "gate", tmp_path / "report.json"
    running = begun(small, "unruly", report, nodes=3, how="waits", **{"gate.path": str(gate)})
    until(gate.with_suffix(".began").exists, "the second node is at work")
    set_tables(small.folder / "hospital-a/client.toml", {"flower": {"apps": {}}})
    small.clients["hospital-a"].signal(signal.SIGTERM)
    small.start("hospital-a")  # whose engineer does not want this app any more
    found = ended(running, report)
    refused = "the site refuses the app: task_not_allowed: app 'fedge-tests/unruly' is not among this site's"
    assert refused in found[1]["1"]
    assert "1" not in found[2], "its nodes are not there any more"
    assert [row["2"] for row in found] == [1, 2, 3, 4]


REFUSALS = {
    "not listed": (
        {"flower": {"apps": {}}},
        "app 'fedge-tests/unruly' is not among this site's [flower] apps",
    ),
    "privacy": (
        {"policy": {"units": ["example"]}},
        "nothing of app 'fedge-tests/unruly' is protected by the site",
    ),
    "sums": (
        {"policy": {"require_secure_aggregation": True}},
        "this site's policy requires secure aggregation",
    ),
    "not there": (
        {"flower": {"apps": {"fedge-tests/unruly": "nowhere"}}},
        "is not installed properly at this site",
    ),
    "another": (
        {"flower": {"apps": {"fedge-tests/unruly": str(APPS / "legacy")}}},
        "this site has fedge-tests/legacy 1.0.0 installed, and was asked for fedge-tests/unruly 1.0.0",
    ),
}


def test_a_site_refuses_what_its_engineer_has_not_allowed_and_says_why(tmp_path: Path):
    with coordinator(tmp_path) as federation:
        for name, (tables, _) in REFUSALS.items():
            site = name.replace(" ", "-")
            federation.enrol(site, **{"flower": partitions(0, of=1), **tables})
            federation.start(site)
        federation.enrol("hospital-a", flower=partitions(0, of=1))
        federation.start("hospital-a")
        report = tmp_path / "report.json"
        running = begun(federation, "unruly", report, nodes=1, how="")
        assert ended(running, report) == [{"0": n} for n in (1, 2, 3, 4)]
        for name, (_, says) in REFUSALS.items():
            assert f"not taking part: {name.replace(' ', '-')}: " in running.output
            assert says in running.output


def test_mistakes_of_whoever_submits_are_said(hospitals: Federation, tmp_path: Path):
    app, admin = APPS / "unruly", hospitals.admin_toml
    for arguments, says in (
        (["--admin", tmp_path / "none.toml"], "none.toml"),
        (["--admin", admin, "--workers", "3"], "--workers and --seed are of simulations"),
        (["--admin", admin, "--nodes", "0"], "--nodes: expected 1 to 1000000 nodes to wait for"),
    ):
        done = fedge("flower", "run", app, *arguments)
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
