"""Runs with example-level privacy, on real processes: what the sites demand happens, and is paid for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from harness import Federation, Running, fedge, fedge_ok, run_toml

PRIVACY = '[privacy]\nunit = "example"\nepsilon = {}\ndelta = 1e-5\nclip = 1.0\n'


def ledger(federation: Federation, site: str, *flags: str) -> dict[str, Any]:
    path = federation.folder / site / "client.toml"
    return json.loads(fedge_ok("client", "ledger", path, "--json", *flags))


@pytest.fixture
def hospital(bare: Federation, request: pytest.FixtureRequest) -> Iterator[Hospital]:
    """Two sites of this test's own; one of them insists on privacy."""
    tag = f"{abs(hash(request.node.name)) % 10**6}"
    strict, lax = f"strict-{tag}", f"open-{tag}"
    bare.enrol(strict, policy={"units": ["example"], "max_epsilon": 5.0})
    bare.enrol(lax)
    for name in (strict, lax):
        bare.start(name)
    yield Hospital(bare, strict, lax)
    for name in (strict, lax):
        bare.clients[name].end()


@dataclass(frozen=True)
class Hospital:
    federation: Federation
    strict: str
    open: str


def test_a_private_run_is_paid_for_by_each_site_and_stated_by_the_coordinator(hospital: Hospital):
    federation, sites = hospital.federation, (hospital.strict, hospital.open)
    detail = federation.run(run_toml("private", more=PRIVACY.format(3.0)))
    run_id = detail.summary.run_id

    # The coordinator has seen neither a number of examples nor a metric.
    assert [row.num_examples for row in detail.history] == [2, 2, 2]
    assert not any(row.metrics for row in detail.history)
    assert "example-level differential privacy, epsilon 3" in federation.show_json(run_id)["protection"]

    # Both sites have spent what the run may, and no more; every number is found again by another accountant.
    for site in sites:
        found = ledger(federation, site, "--verify")
        assert found["verified"] == 3 * 3  # reserved, sent and settled, in each round
        (run,) = found["runs"]
        assert run["name"] == run_id
        assert 2.5 < run["stated"] < run["epsilon"] <= 3.0

    # The coordinator's own record, by what was promised.
    spent = json.loads(fedge_ok("site", "spent", "--admin", federation.admin_toml, "--json"))
    assert [
        (each["runs"], each["epsilon"], each["unbounded"]) for each in spent if each["site"] in sites
    ] == [(1, 3.0, 0)] * 2

    # The statement is signed, and a changed one is not.
    path, ca = federation.folder / "statement.json", federation.home / "ca.pem"
    printed = json.loads(
        fedge_ok("run", "statement", run_id, "--admin", federation.admin_toml, "--out", path)
    )
    assert (printed["unit"], printed["epsilon"]) == ("example", 3.0)
    assert printed["sites"] == dict.fromkeys(sites, 3)
    assert json.loads(fedge_ok("run", "statement", "--verify", path, "--ca", ca)) == printed
    path.write_text(path.read_text().replace('"epsilon": 3.0', '"epsilon": 1.0'))
    changed = fedge("run", "statement", "--verify", path, "--ca", ca)
    assert changed.returncode == 5
    assert "signed by a coordinator of this CA" in changed.stderr


def test_an_exhausted_site_refuses_also_after_a_restart_and_the_run_goes_on(hospital: Hospital):
    federation, strict = hospital.federation, hospital.strict
    federation.run(run_toml("first", more=PRIVACY.format(4.5)))
    for again in range(2):
        detail = federation.run(run_toml("second", quorum=1, more=PRIVACY.format(3.5)))
        cohorts = [row.clients for row in detail.history]
        assert len(cohorts) == 3
        assert hospital.open in cohorts[-1]
        assert sum(strict in cohort for cohort in cohorts) < 3
        assert "budget_exhausted" in federation.clients[strict].output
        assert ledger(federation, strict, "--verify")["total"]["epsilon"] <= 5.0
        federation.clients[strict].end()
        federation.start(strict)
        assert again or ledger(federation, strict)["total"]["epsilon"] > 4.0


def test_a_run_without_protection_never_starts_where_the_policy_requires_it(hospital: Hospital):
    federation, strict = hospital.federation, hospital.strict
    detail = federation.run(run_toml("unprotected", quorum=1))
    assert {client for row in detail.history for client in row.clients} == {hospital.open}
    refused = {client.name: client.detail for client in federation.show(detail.summary.run_id).clients}
    assert "no differential privacy" in refused[strict]
    assert not ledger(federation, strict)["runs"]
    assert "asked=task tiny:task" in federation.clients[strict].output
    assert [run["unprotected"] for run in ledger(federation, hospital.open)["runs"]] == [True]


def test_what_a_run_would_cost_is_said_before_and_nothing_is_spent(hospital: Hospital):
    federation, strict = hospital.federation, hospital.strict
    path, client = federation.folder / "planned.toml", federation.folder / strict / "client.toml"
    path.write_text(run_toml("planned", more=PRIVACY.format(3.0)))
    found = json.loads(fedge_ok("privacy", "plan", path, "--client", client, "--json"))
    assert found["spent_before"] == 0
    assert 2.5 < found["spent_after"] <= 3.0
    assert not found["refusal"]
    assert "epsilon" in fedge_ok("privacy", "plan", path, "--examples", "50")
    path.write_text(run_toml("planned"))
    refused = fedge("privacy", "plan", path, "--client", client)
    assert refused.returncode == 6
    assert "no differential privacy" in refused.stderr
    assert not ledger(federation, strict)["runs"]


CLIENT_LEVEL = """[privacy]
unit = "client"
noise_multiplier = 2.0
delta = 1e-5
clip = 0.5
separation = 2
evaluation_noise_multiplier = 20.0
[privacy.adaptive_clip]
[evaluation]
every = 4
"""


def test_client_level_privacy_takes_place_among_sites_that_trust_the_coordinator(bare: Federation):
    trusting = ["trusting-1", "trusting-2"]
    for name in trusting:
        bare.enrol(name, policy={"trust_coordinator": True, "units": ["client"]})
    bare.enrol("wary")
    for name in (*trusting, "wary"):
        bare.start(name)
    text = run_toml("central", size=1, quorum=1, rounds=4, more=CLIENT_LEVEL)
    (bare.folder / "central.toml").write_text(text)
    assert "at least 2 sites" in fedge_ok("privacy", "plan", bare.folder / "central.toml")
    detail = bare.run(text)
    run_id = detail.summary.run_id
    refused = {client.name: client.detail for client in bare.show(run_id).clients}
    assert "trust_coordinator" in refused["wary"]

    # Two sites take turns, as the noise was made for; the clip adapts; metrics have noise, and are few.
    cohorts = [list(row.clients) for row in detail.history]
    assert sorted(cohorts[0] + cohorts[1]) == trusting
    assert cohorts[:2] == cohorts[2:]
    metrics = [{each.name: each.value for each in row.metrics} for row in detail.history]
    assert [set(each) for each in metrics[:3]] == [{"clip", "within_clip"}] * 3
    assert {"loss"} < set(metrics[3])
    assert len({each["clip"] for each in metrics}) == 4

    # Each site has paid for its own turns.
    for site in trusting:
        found = ledger(bare, site, "--verify")
        assert found["verified"] > 0
        assert "2 x Gaussian, noise multiplier 2" in found["runs"][0]["releases"]
    said = json.loads(fedge_ok("run", "statement", run_id, "--admin", bare.admin_toml))
    assert (said["unit"], said["participations"]) == ("client", 2)
    assert "correlated over 2 rounds" in said["mechanism"]
    assert "the coordinator" in said["trust"]
    assert max(ledger(bare, site)["total"]["stated"] for site in trusting) <= said["epsilon"] * (1 + 1e-6)
    for name in (*trusting, "wary"):
        bare.clients[name].end()


def test_a_site_whose_whole_disk_was_put_back_is_stopped_by_what_its_coordinator_has_kept(hospital: Hospital):
    federation, strict = hospital.federation, hospital.strict
    folder, backup = federation.folder / strict, federation.folder / f"{strict}-backup"
    federation.run(run_toml("before", more=PRIVACY.format(2.0)))
    federation.clients[strict].end()
    shutil.copytree(folder, backup, ignore=shutil.ignore_patterns("control"))
    federation.start(strict)
    federation.run(run_toml("after", more=PRIVACY.format(2.0)))
    federation.clients[strict].end()
    spent = ledger(federation, strict)["total"]["epsilon"]
    shutil.copytree(backup, folder, dirs_exist_ok=True)
    assert ledger(federation, strict, "--verify")["total"]["epsilon"] < spent, "nothing on it looks wrong"

    log = federation.folder / "rolled-back.log"
    rolled_back = Running.start("client", "start", folder / "client.toml", log=log)
    assert rolled_back.ends() == 6
    assert "a witness remembers" in rolled_back.output
    assert "accepted as it is" in fedge_ok("client", "ledger", folder / "client.toml", "--trust")
    federation.start(strict)
    federation.run(run_toml("on", more=PRIVACY.format(2.0)))
