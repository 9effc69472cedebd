"""The gate: what the site's policy does not allow does not happen, whatever anybody asks for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge.errors import RefusedError
from fedge.exact import MAX_WEIGHT
from fedge.pipeline import l2_norm
from fedge.refusal import RefusalCode
from fedge.vector import Array, Layout, Tensor
from fedge.wire.limits import MAX_METRICS
from fedge_client.gate import (
    Released,
    check_coordinator,
    check_layout,
    check_task,
    layers_of,
    release,
)
from fedge_client.settings import Policy

LAYOUT = Layout((Tensor("w", (3,)), Tensor("b", ())))
FINE: Array = np.array([3.0, 0.0, 4.0, 0.0], np.float32)


def refused(call: Callable[[], object]) -> RefusalCode:
    with pytest.raises(RefusedError) as error:
        call()
    assert str(error.value)
    return error.value.refusal.code


def let_out(
    vector: Array = FINE, num_examples: int = 10, clip: float | None = None, **metrics: float
) -> Released:
    return release(vector, num_examples, metrics, layout=LAYOUT, layers=layers_of(clip))


# Which coordinator.


@pytest.mark.parametrize(
    ("allowed", "federation", "own"),
    [(None, "aa", "aa"), (["aa"], "aa", "aa"), (["bb", "aa"], "aa", "aa")],
)
def test_the_federation_that_the_site_enrolled_in_may_ask(allowed, federation, own):
    check_coordinator(Policy(coordinators=allowed), federation, own=own)


@pytest.mark.parametrize(
    ("allowed", "federation", "own"),
    [(None, "bb", "aa"), (["bb"], "aa", "aa"), (["bb"], "bb", "aa"), ([], "aa", "aa")],
)
def test_any_other_may_not_even_if_the_policy_lists_it(allowed, federation, own):
    code = refused(lambda: check_coordinator(Policy(coordinators=allowed), federation, own=own))
    assert code == RefusalCode.COORDINATOR_NOT_ALLOWED


# Which task.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task folder of every kind of module; importing any of them is the end of the test."""
    place = tmp_path / "tasks"
    bomb = "raise SystemExit('imported only to find out')"
    for name in ("alone.py", "package/__init__.py", "package/inner.py", "plain/inner.py", "json/inner.py"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(bomb)
    (place / "shared").mkdir()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "shared").mkdir(parents=True)
    (elsewhere / "shared" / "inner.py").write_text(bomb)
    (elsewhere / "installed.py").write_text(bomb)
    monkeypatch.syspath_prepend(str(elsewhere))
    return place


@pytest.mark.parametrize("task", ["alone:task", "package:task", "package.inner:task", "plain.inner:task"])
def test_without_a_list_the_tasks_in_the_sites_own_folder_may_run_and_nothing_is_imported(folder, task):
    before = set(sys.modules)
    check_task(Policy(), task, folder=folder)
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "task",
    [
        "absent:task",
        "installed:task",
        "os:system",
        "numpy:array",
        "sys:exit",
        "json.inner:task",  # the standard library's comes before a folder without __init__
        "shared.inner:task",  # a part of the package lies elsewhere
        "fedge_sim.demo.hospitals:task",
        "../elsewhere/installed:task",
        ".alone:task",
        ":task",
        "",
    ],
)
def test_without_a_list_nothing_else_may_run_and_nothing_is_imported(folder, task):
    before = set(sys.modules)
    assert refused(lambda: check_task(Policy(), task, folder=folder)) == RefusalCode.TASK_NOT_ALLOWED
    assert set(sys.modules) == before


def test_a_list_is_the_whole_truth(folder):
    policy = Policy(tasks=["installed:task", "alone:task"])
    for task in ("installed:task", "alone:task"):
        check_task(policy, task, folder=folder)
    for task in ("package:task", "alone:other", "alone", "installed:task "):
        assert (
            refused(lambda task=task: check_task(policy, task, folder=folder)) == RefusalCode.TASK_NOT_ALLOWED
        )
    assert refused(lambda: check_task(Policy(tasks=[]), "alone:task", folder=folder))


def test_a_model_may_be_as_large_as_the_policy_allows_and_none_is_made_to_find_out():
    check_layout(Policy(max_model_bytes=16), LAYOUT)
    assert refused(lambda: check_layout(Policy(max_model_bytes=15), LAYOUT)) == RefusalCode.TOO_LARGE
    vast = Layout((Tensor("w", (2**40, 2**20)),))
    assert refused(lambda: check_layout(Policy(), vast)) == RefusalCode.TOO_LARGE


# What leaves.


def test_an_update_that_is_what_it_claims_leaves_as_it_is():
    released = let_out(train_loss=0.5)
    np.testing.assert_array_equal(released.vector, FINE)
    assert (released.num_examples, dict(released.metrics)) == (10, {"train_loss": 0.5})


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from([None, 1.0]))
def test_one_number_that_is_not_finite_keeps_the_update_in(at, bad, clip):
    vector = FINE.copy()
    vector[at] = bad
    # A model that diverged has such metrics, too; the reason given is the one that helps.
    assert refused(lambda: let_out(vector, clip=clip, train_loss=math.nan)) == RefusalCode.NOT_FINITE


def test_the_largest_finite_numbers_are_finite():
    vector = np.full(4, np.finfo(np.float32).max, np.float32)
    np.testing.assert_array_equal(let_out(vector).vector, vector)


@pytest.mark.parametrize(
    "vector",
    [FINE[:3], np.zeros(5, np.float32), FINE.astype(np.float64), FINE.reshape(2, 2), np.zeros(0, np.float32)],
    ids=["short", "long", "float64", "a matrix", "empty"],
)
def test_a_vector_that_is_not_of_the_runs_layout_stays_in(vector):
    assert refused(lambda: let_out(vector)) == RefusalCode.WRONG_LENGTH


@pytest.mark.parametrize("num_examples", [0, -1, MAX_WEIGHT])
def test_an_update_that_weighs_nothing_or_too_much_stays_in(num_examples):
    assert refused(lambda: let_out(num_examples=num_examples)) == RefusalCode.BAD_WEIGHT
    assert let_out(num_examples=MAX_WEIGHT - 1).num_examples == MAX_WEIGHT - 1


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"": 1.0},
        {"a\x1b": 1.0},
        {"x" * 300: 1.0},
        {"\udcff": 1.0},
        {1: 1.0},
        {"loss": "low"},
        {f"m{number}": 1.0 for number in range(MAX_METRICS + 1)},
    ],
)
def test_metrics_that_are_not_finite_numbers_under_short_names_keep_the_update_in(metrics):
    assert refused(lambda: release(FINE, 1, metrics, layout=LAYOUT, layers=())) == RefusalCode.BAD_METRICS


def test_an_evaluation_leaves_without_any_vector():
    leftovers = np.full(4, math.nan, np.float32)
    released = release(leftovers, 5, {"loss": 1.0}, layout=None, layers=layers_of(1.0))
    assert len(released.vector) == 0
    assert dict(released.metrics) == {"loss": 1.0}
    code = refused(lambda: release(leftovers, 5, {"loss": math.nan}, layout=None, layers=()))
    assert code == RefusalCode.BAD_METRICS


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, 4, elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.floats(1e-6, 1e6),
)
def test_what_leaves_is_never_longer_than_the_clip_and_shorter_ones_are_left_alone(vector, clip):
    before = vector.copy()
    out = let_out(vector, clip=clip).vector
    assert l2_norm(out) <= clip
    if l2_norm(vector) <= clip:
        np.testing.assert_array_equal(out, vector)
    np.testing.assert_array_equal(vector, before)


def test_a_clipped_update_keeps_its_direction():
    np.testing.assert_allclose(let_out(clip=1.0).vector, FINE / 5, rtol=1e-6)
