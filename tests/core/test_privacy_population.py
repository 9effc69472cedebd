"""What a coordinator's runs may have spent of each site, by what they promised."""

from __future__ import annotations

import json

from fedge.privacy.population import Spend, population
from fedge.privacy.statement import state
from fedge.run import RunConfig
from fedge.vector import Layout, Tensor

LAYOUT = Layout((Tensor("w", (2,)),))


def said(cohorts: list[list[str]], **privacy: object) -> dict[str, object]:
    table = {"name": "a", "task": "app:task", "rounds": 4, "evaluation": {"every": 0}, "privacy": privacy}
    run = RunConfig.from_table(table, source="run.toml")
    return json.loads(state(run, "a-1", "done", cohorts, LAYOUT).encode())


EXAMPLE = {"unit": "example", "epsilon": 2.0, "delta": 1e-5, "clip": 1.0}


def test_epsilons_and_deltas_of_a_sites_runs_add_up_unit_by_unit():
    client = {"unit": "client", "epsilon": 3.0, "delta": 1e-4, "clip": 1.0}
    one = said([["x", "y"]] * 4, **client)
    found = population([said([["x", "y"], ["y"]], **EXAMPLE), said([["x"]], **EXAMPLE), one])
    assert found == [
        Spend("x", "client", 1, one["epsilon"], 1e-4),
        Spend("x", "example", 2, 4.0, 2e-5),
        Spend("y", "client", 1, one["epsilon"], 1e-4),
        Spend("y", "example", 1, 2.0, 1e-5),
    ]
    assert 2.5 < one["epsilon"] <= 3.0


def test_runs_of_which_nothing_can_be_said_are_counted_apart():
    fixed = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "clip": 1.0}
    found = population([said([["x"]], unit="none"), said([["x"]], **fixed), said([["x"]], **EXAMPLE)])
    assert found == [Spend("x", "example", 2, 2.0, 1e-5, 1), Spend("x", "none", 1, 0.0, 0.0, 1)]


def test_whoever_took_part_in_nothing_has_spent_nothing():
    assert population([said([], **EXAMPLE)]) == []
