"""Removing any check of secure aggregation fails a test: each is removed, and the tests that get to it are run.

What a check is, and what becomes of it, is in tests/support/mutants.py. Whoever adds one adds a test that fails without
it, or says below why there can be none.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from mutants import modules_of, mutants

import fedge.secagg

PARTS = 2
"""As many as `make test` has processes."""

LIMIT_S = 240

MODULES = modules_of(fedge.secagg)
MUTANTS = [each for module in MODULES for each in mutants(module)]
CORE = Path(__file__).parent
TESTS = sorted(path for path in CORE.glob("test_secagg_*.py") if path.name != Path(__file__).name)

EQUIVALENT = {
    (
        "fixed_point.FixedPoint.__post_init__",
        "self.levels < 2 * self.max_weight",
        "off by one: self.levels < 2 * self.max_weight",
        1,
    ): "levels + 1 is 2^k / clients, and no odd number divides a power of two: the two are never equal",
    (
        "grid.rounded_norm",
        "min(likely, (scaled_clip + root) ** 2)",
        "without (scaled_clip + root) ** 2",
        1,
    ): "the other part of the paper's equation 3, which is less only with a smaller _BIAS than this",
}
"""Mutants that do what the code does, and why."""


def survivors_of(
    part: str, tests: Sequence[Path], findings: Path, package: str = "fedge.secagg"
) -> tuple[int, set[tuple[str, str, str, int]]]:
    """(how many mutants there were, those that no test fails for)."""
    command = [sys.executable, "-B", "-m", "mutant_hunt", str(findings), part, package]
    process = subprocess.Popen(
        [*command, f"--basetemp={findings.parent / 'hunt'}", *map(str, tests)],
        cwd=CORE.parents[1],
        env={**os.environ, "PYTHONPATH": str(CORE.parent / "support")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and the mutant that it waits for
            process.communicate()
    assert process.returncode == 0, said[-3000:]
    found = json.loads(findings.read_text(encoding="utf-8"))
    return found["mutants"], {tuple(name) for name in found["survivors"]}


def listed(names: Collection[tuple[str, str, str, int]]) -> str:
    return "".join(f"\n  {function}: {check}\n    {change}" for function, check, change, _ in sorted(names))


@pytest.mark.parametrize("part", range(PARTS))
def test_removing_any_check_of_secure_aggregation_fails_a_test(part: int, tmp_path: Path):
    count, survivors = survivors_of(f"{part}/{PARTS}", TESTS, tmp_path / "findings.json")
    here = MUTANTS[part::PARTS]
    assert count == len(here)
    missed = survivors - EQUIVALENT.keys()
    assert not missed, f"no test fails without these: write one, or say in EQUIVALENT why not{listed(missed)}"
    stale = ({each.name for each in here} & EQUIVALENT.keys()) - survivors
    assert not stale, f"a test fails without these: take them off EQUIVALENT{listed(stale)}"


def test_what_no_test_gets_to_survives(tmp_path: Path):
    """Else the law above would hold whatever the tests."""
    tests = [CORE / "test_secagg_masks.py"]
    _, survivors = survivors_of("0/8", tests, tmp_path / "findings.json")
    some = MUTANTS[0::8]
    covered = {each.name for each in some if each.module in ("fedge.secagg.masks", "fedge.secagg.ring")}
    assert covered
    assert survivors == {each.name for each in some} - covered


def guards_of(module: ModuleType) -> list[str]:
    """Under what a module raises."""
    out = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if any(isinstance(each, ast.Raise) for each in ast.iter_child_nodes(node)):
            match node:
                case ast.If(test=test):
                    out.append(f"if {ast.unparse(test)}")
                case ast.ExceptHandler(type=ast.expr() as caught):
                    out.append(f"except {ast.unparse(caught)}")
                case _:
                    raise AssertionError(f"expected conditions for errors, found {ast.unparse(node)}")
    return out


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_whatever_raises_has_a_mutant_that_does_not(module: ModuleType):
    without = Counter(each.check for each in mutants(module) if each.change in ("never", "ignored"))
    assert not Counter(guards_of(module)) - without


def test_there_are_as_many_mutants_of_each_kind_as_one_would_think():
    kinds = {
        "never": 110,
        "always": 25,
        "all": 8,
        "ignored": 6,
        "without": 110,
        "off": 30,
        "true": 5,
        "gone": 25,
    }
    found = Counter(each.change.split()[0] for each in MUTANTS)
    assert found.keys() == kinds.keys()
    assert {kind: found[kind] for kind in kinds if found[kind] < kinds[kind]} == {}


def test_mutants_have_names_of_their_own_and_whoever_is_excused_is_one():
    names = {each.name for each in MUTANTS}
    assert len(names) == len(MUTANTS)
    assert EQUIVALENT.keys() <= names
