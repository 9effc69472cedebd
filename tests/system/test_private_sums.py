"""Client-level privacy inside a secure sum, on real processes: nobody is trusted, and each site pays for its turns."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Federation, coordinator, fedge_ok, initial_model, run_toml, until

from fedge.config import parse_toml
from fedge.privacy.mechanism import Skellam
from fedge.run import RunConfig
from fedge.secagg.terms import SumTerms
from fedge.wire import fedge_pb2 as pb
from fedge_strategies import FedAvg

SITES = ["ward-1", "ward-2", "ward-3", "ward-4"]
POLICY = {"units": ["client"], "require_secure_aggregation": True, "min_cohort": 3, "max_epsilon": 6.0}
PRIVATE = """[secure_aggregation]
enabled = true
[privacy]
unit = "client"
delta = 1e-5
clip = 0.5
"""


def ledger(federation: Federation, site: str) -> dict[str, Any]:
    path = federation.folder / site / "client.toml"
    found: dict[str, Any] = json.loads(fedge_ok("client", "ledger", path, "--json", "--verify"))
    return found


@pytest.fixture(scope="module")
def wards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Of which all sites are at work."""
    with enrolled(tmp_path_factory.mktemp("wards")) as federation:
        for name in SITES:
            federation.start(name)
        yield federation


@contextlib.contextmanager
def enrolled(folder: Path) -> Iterator[Federation]:
    with coordinator(folder) as federation:
        for name in SITES:
            federation.enrol(name, policy=POLICY)
        yield federation


def test_sites_that_trust_nobody_are_protected_as_a_whole_by_noise_of_their_own(wards: Federation):
    text = run_toml("whole", size=4, quorum=4, rounds=3, more=PRIVATE + "epsilon = 4.0\n")
    path = wards.folder / "whole.toml"
    path.write_text(text)
    planned = json.loads(
        fedge_ok("privacy", "plan", path, "--client", wards.folder / SITES[0] / "client.toml", "--json")
    )
    assert not planned["refusal"]
    assert 3.9 < planned["cost"]["epsilon"] <= 4.0

    detail = wards.run(text)
    run_id = detail.summary.run_id
    assert [row.num_examples for row in detail.history] == [4, 4, 4]
    assert not any(row.metrics for row in detail.history)
    protection = wards.show_json(run_id)["protection"]
    assert "client-level differential privacy, epsilon 4" in protection
    assert "the sites add the noise inside the sum; secure aggregation" in protection

    for site in SITES:
        (run,) = ledger(wards, site)["runs"]
        assert "3 x Skellam" in str(run["releases"])
        assert run["epsilon"] == pytest.approx(planned["cost"]["admission_epsilon"], rel=1e-6)
    said = json.loads(fedge_ok("run", "statement", run_id, "--admin", wards.admin_toml))
    assert "no single party" in said["trust"]
    assert 3.9 < said["epsilon"] <= 4.0
    assert said["sites"] == dict.fromkeys(SITES, 3)

    coarse = wards.folder / SITES[0] / "coarse.toml"
    few_bits = PRIVATE.replace("enabled = true", "enabled = true\nbits = 13") + "epsilon = 6.0\n"
    coarse.write_text(run_toml("coarse", task="wide:task", size=20, quorum=20, rounds=3, more=few_bits))
    assert "rounding to the grid of the secure sums adds" in fedge_ok("privacy", "plan", coarse)

    # Without secure sums the coordinator would add the noise, which none of these sites believes.
    in_clear = PRIVATE.replace("enabled = true", "enabled = false") + "epsilon = 4.0\n"
    other = wards.submit(run_toml("believe-me", size=4, quorum=3, rounds=1, more=in_clear))
    until(lambda: len(refusals(wards, other)) == 4, "all have refused")
    wards.admin.Stop(pb.RunRef(run_id=other))


def test_the_noise_of_a_committed_round_is_that_of_all_whose_updates_are_in_it(wards: Federation):
    """Of an update of norm 0.5 nothing is left to see where noise of 25 is added to each of its elements."""
    text = run_toml(
        "noise", task="wide:task", size=4, quorum=4, rounds=1, more=PRIVATE + "noise_multiplier = 50.0\n"
    )
    run_id = wards.run(text).summary.run_id
    run, initial = parse_toml(text, RunConfig, source="run.toml"), initial_model(text)
    terms = SumTerms.of(run, FedAvg(), initial.layout)
    assert terms is not None
    assert isinstance(terms.mechanism, Skellam)
    moved = wards.model(run_id) - initial.vector
    expected = 50.0 * 0.5 * math.sqrt(4 / terms.honest) / 4
    found = math.sqrt(float((moved.astype(np.float64) ** 2).mean()))
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_an_attempt_that_a_site_has_handed_in_for_is_paid_for_and_the_next_one_too(tmp_path: Path):
    """Of four two are gone with their inputs, which leaves too few. A coordinator that lied about that could have
    read the sum: whoever hands in again adds fresh noise, and pays again."""
    with enrolled(tmp_path) as federation:
        for name in SITES[:2]:
            federation.start(name)
        for name in SITES[2:]:
            federation.start(name, fault="sum.masked:1")
        more = PRIVATE + "noise_multiplier = 4.0\nmax_participations = 3\n"
        text = run_toml("again", size=4, quorum=3, rounds=2, more=more)
        with contextlib.ExitStack() as stack:
            for name in SITES:
                stack.enter_context(federation.blocked(name))
            run_id = federation.submit(text)
            for name in SITES:
                federation.at_work(name)
        for name in SITES[2:]:
            assert federation.clients[name].ends() == -signal.SIGKILL
            federation.start(name)
        assert federation.finish(run_id).status == "done"
        history = federation.show(run_id).history
        assert [row.round for row in history] == [1, 2]
        assert history[0].attempt > 1
        for site in SITES[:2]:
            (run,) = ledger(federation, site)["runs"]
            assert "3 x Skellam" in str(run["releases"])


def refusals(federation: Federation, run_id: str) -> list[str]:
    return [client.detail for client in federation.show(run_id).clients if client.state == "refused"]
