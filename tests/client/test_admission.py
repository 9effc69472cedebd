"""Admission: what the site's policy does not allow does not happen, whatever anybody asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import RefusedError, RemoteProtocolError
from fedge.privacy.terms import Terms
from fedge.refusal import RefusalCode
from fedge.run import Work
from fedge.secagg.terms import SumTerms
from fedge.vector import Layout, Tensor
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_layout, encode_terms, encode_work
from fedge.wire.secure import encode_sum_terms
from fedge_client.admission import Request, admit, check_coordinator, check_layout, check_task
from fedge_client.protection import Protection
from fedge_client.settings import Policy

LAYOUT = Layout((Tensor("w", (3,)), Tensor("b", ())))


def refused(call: Callable[[], object]) -> RefusalCode:
    with pytest.raises(RefusedError) as error:
        call()
    assert str(error.value)
    return error.value.refusal.code


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


# What protection, and what work.

TERMS = Terms("example", 1e-5, 1.0, 20, epsilon=3.0)
ASKED = Request(
    run_id="run",
    task="alone:task",
    strategy="fedavg",
    kind="train",
    rounds=20,
    seed=1,
    work=Work(epochs=2, learning_rate=0.1),
    layout=LAYOUT,
    clip=1.0,
    terms=TERMS,
    cohort=5,
    secure=None,
)
CLIENT_LEVEL = replace(ASKED, terms=replace(TERMS, unit="client"))
SUMS = SumTerms(least=5, clients=8, bound=1.0)
SECURE = replace(ASKED, secure=SUMS)
UNPROTECTED = replace(ASKED, terms=None, clip=None)


def test_what_the_policy_does_not_mention_is_allowed(folder):
    admit(Policy(), ASKED, folder=folder)
    admit(Policy(), UNPROTECTED, folder=folder)


@pytest.mark.parametrize(
    ("policy", "asked", "code"),
    [
        (Policy(tasks=["b:c"]), ASKED, RefusalCode.TASK_NOT_ALLOWED),
        (Policy(max_model_bytes=8), ASKED, RefusalCode.TOO_LARGE),
        (Policy(strategies=["mirrored_sgd"]), ASKED, RefusalCode.STRATEGY_NOT_ALLOWED),
        (Policy(strategies=[]), ASKED, RefusalCode.STRATEGY_NOT_ALLOWED),
        (Policy(units=["example"]), UNPROTECTED, RefusalCode.PROTECTION_TOO_WEAK),
        (Policy(units=["client"], trust_coordinator=True), ASKED, RefusalCode.PROTECTION_TOO_WEAK),
        (Policy(units=["none"]), ASKED, RefusalCode.PROTECTION_TOO_WEAK),
        (Policy(min_cohort=6), ASKED, RefusalCode.PROTECTION_TOO_WEAK),
        (Policy(require_secure_aggregation=True), ASKED, RefusalCode.PROTECTION_TOO_WEAK),
        (Policy(), CLIENT_LEVEL, RefusalCode.PROTECTION_TOO_WEAK),
        # A sum hides among its members, however many sites the round has.
        (Policy(min_cohort=6), replace(SECURE, cohort=8), RefusalCode.PROTECTION_TOO_WEAK),
        (
            Policy(),
            replace(SECURE, secure=replace(SUMS, consistency=False)),
            RefusalCode.PROTECTION_TOO_WEAK,
        ),
        # The coordinator adds the noise to a sum, too.
        (Policy(), replace(CLIENT_LEVEL, secure=SUMS), RefusalCode.PROTECTION_TOO_WEAK),
        (Policy(epochs=(1, 1)), ASKED, RefusalCode.WORK_NOT_ALLOWED),
        (Policy(epochs=(3, 4)), ASKED, RefusalCode.WORK_NOT_ALLOWED),
        (Policy(epochs=(1, 5)), replace(ASKED, work=Work(steps=3)), RefusalCode.WORK_NOT_ALLOWED),
        (Policy(learning_rate=(0, 0.05)), ASKED, RefusalCode.WORK_NOT_ALLOWED),
        (Policy(clip=(0, 0.5)), ASKED, RefusalCode.WORK_NOT_ALLOWED),
        (Policy(clip=(0, 2)), UNPROTECTED, RefusalCode.WORK_NOT_ALLOWED),
    ],
)
def test_each_line_of_the_policy_refuses_what_it_does_not_allow(folder, policy, asked, code):
    assert refused(lambda: admit(policy, asked, folder=folder)) == code


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        (Policy(strategies=["fedavg"], units=["example"], min_cohort=5), ASKED),
        (Policy(units=["client"], trust_coordinator=True), CLIENT_LEVEL),
        (Policy(epochs=(2, 2), learning_rate=(0.1, 0.1), clip=(1, 1)), ASKED),
        (Policy(epochs=(9, 9)), replace(ASKED, kind="gradient")),
        (Policy(require_secure_aggregation=True, min_cohort=5), SECURE),
        (Policy(honest_coordinator=True), replace(SECURE, secure=replace(SUMS, consistency=False))),
    ],
)
def test_what_lies_within_the_policy_is_allowed(folder, policy, asked):
    admit(policy, asked, folder=folder)


def test_the_owner_is_told_in_words_what_was_asked():
    assert ASKED.in_words() == (
        "task alone:task, strategy fedavg, 20 rounds of 2 epochs at learning rate 0.1; example-level privacy, "
        "epsilon 3 at delta 1e-05, clip 1; without secure aggregation, among 5 sites or more"
    )
    assert "no differential privacy" in UNPROTECTED.in_words()
    assert "; with secure aggregation in sums of 5 sites or more, among 5 sites" in SECURE.in_words()
    honest = replace(SECURE, secure=replace(SUMS, consistency=False))
    assert "with secure aggregation that an honest coordinator does not break" in honest.in_words()


# What is offered is not believed.


def offered(**fields: Any) -> pb.Offer:
    known: dict[str, Any] = {
        "run_id": "run",
        "task": "app:task",
        "strategy_name": "fedavg",
        "kind": pb.KIND_TRAIN,
        "work": encode_work(Work()),
        "layout": encode_layout(LAYOUT),
        "privacy": encode_terms(TERMS),
    }
    return pb.Offer(**(known | fields))


def test_terms_of_privacy_arrive_as_they_were_offered():
    assert Request.of(offered()).terms == TERMS
    full = replace(TERMS, epsilon=None, noise_multiplier=1.5, evaluation_noise_multiplier=9.0, evaluations=4)
    assert Request.of(offered(privacy=encode_terms(full))).terms == full
    assert Request.of(offered(privacy=None)).terms is None


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "none"},
        {"unit": "everybody"},
        {"delta": 0.0},
        {"delta": float("nan")},
        {"clip": 0.0},
        {"clip": float("inf")},
        {"clip": -1.0},
        {"participations": 0},
        {"evaluations": 3},
        {"epsilon": 0.0},
        {"epsilon": float("nan")},
        {"noise_multiplier": -1.0},
        {"loss_bound": 0.0},
    ],
)
def test_terms_that_no_site_could_keep_are_refused_when_they_arrive(change):
    terms = encode_terms(TERMS)
    for name, value in change.items():
        setattr(terms, name, value)
    with pytest.raises(RemoteProtocolError, match="not terms of privacy"):
        Request.of(offered(privacy=terms))


def test_terms_without_epsilon_and_noise_are_refused():
    terms = encode_terms(TERMS)
    terms.ClearField("epsilon")
    with pytest.raises(RemoteProtocolError, match="not terms of privacy"):
        Request.of(offered(privacy=terms))


@pytest.mark.parametrize(
    "fields",
    [{"kind": pb.KIND_EVALUATE}, {"kind": pb.KIND_UNSPECIFIED}, {"strategy_name": "a\nb"}, {"clip": 0.5}],
)
def test_an_offer_that_contradicts_itself_is_refused(fields):
    with pytest.raises(RemoteProtocolError):
        Request.of(offered(**fields))


PRIVATE = Terms("client", 1e-5, 1.0, 20, epsilon=3.0)
NOISE = SUMS.with_noise(PRIVATE, LAYOUT)


def summed(terms: Terms | None, sums: SumTerms) -> pb.Offer:
    return offered(
        clip=None,
        cohort=5,
        privacy=encode_terms(terms) if terms is not None else None,
        secure_aggregation=encode_sum_terms(sums),
    )


def test_where_the_sites_add_the_noise_no_coordinator_is_trusted(folder):
    request = Request.of(summed(PRIVATE, NOISE))
    assert request.noise_of_sums == NOISE.mechanism
    assert "clip 1, by noise that the members of each sum add; with secure" in request.in_words()
    admit(Policy(units=["client"]), replace(request, task="alone:task"), folder=folder)
    assert Protection.of(request, train_examples=7).cost("train") == NOISE.mechanism


@pytest.mark.parametrize(
    ("terms", "sums"),
    [
        (PRIVATE, SUMS),
        (replace(PRIVATE, unit="example"), NOISE),
        (None, NOISE),
        (replace(PRIVATE, clip=2.0), NOISE),
        (PRIVATE, replace(NOISE, bound=0.5)),
        (PRIVATE, replace(NOISE, noise=replace(NOISE.noise, size=2))),
        (replace(PRIVATE, evaluations=2, evaluation_noise_multiplier=3.0), NOISE),
        (replace(PRIVATE, separation=2), NOISE),
        (replace(PRIVATE, evaluation_noise_multiplier=3.0), NOISE),
        (PRIVATE, replace(NOISE, consistency=False)),
    ],
    ids=[
        "no noise",
        "of examples",
        "no terms",
        "another clip",
        "another bound",
        "another model",
        "evaluations",
        "rests",
        "noise of evaluations",
        "an honest coordinator",
    ],
)
def test_noise_of_sums_that_does_not_fit_the_terms_of_privacy_is_refused_when_it_arrives(terms, sums):
    with pytest.raises(RemoteProtocolError, match=r"expected (noise|one clip|neither)"):
        Request.of(summed(terms, sums))


def test_noise_that_does_not_keep_what_was_promised_is_refused_before_anything_is_trained():
    less = replace(NOISE, noise=replace(NOISE.noise, variance=NOISE.noise.variance / 1.1))
    request = Request.of(summed(PRIVATE, less))
    assert refused(lambda: Protection.of(request, train_examples=7)) == RefusalCode.PROTECTION_UNAVAILABLE
