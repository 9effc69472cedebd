"""What the agent answers to orders of a run under terms of privacy, and what of it is spent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_site import Site, Worker, offer, order

from fedge.privacy.mechanism import Gaussian
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.terms import Terms
from fedge.refusal import Refusal, RefusalCode
from fedge.strategy import WorkKind
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_terms
from fedge_client import performing
from fedge_client import pipe_pb2 as pipe
from fedge_client.jobs import OUTBOX
from fedge_client.settings import Policy


@dataclass
class PrivateWorker(Worker):
    """Does what the gate demands, unless it is told to claim something else."""

    claim: dict[str, float] = field(default_factory=dict)
    silent: bool = False
    num_examples: int = 1

    async def perform(self, message: pipe.Perform, *, progress: Callable[[int, int], None]) -> pipe.Finished:
        finished = await super().perform(message, progress=progress)
        finished.num_examples = self.num_examples
        if not self.silent:
            # Three examples in a batch of 32: all of them, once an epoch.
            done = {"noise_multiplier": message.privacy.noise_multiplier, "sampling_rate": 1.0, "count": 1}
            finished.releases.CopyFrom(pipe.Releases(**(done | self.claim)))
        return finished


@pytest.fixture
def private(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.employ(PrivateWorker(metrics={}))
    assert site.consider(private_offer()).HasField("accept")
    return site


def private_offer() -> pb.Offer:
    return offer(privacy=encode_terms(Terms("example", 1e-5, 1.0, 3, epsilon=6.0)))


def charged(site: Site) -> int:
    """Orders that the ledger counts as spent, once nothing is open any more."""
    books = site.ledger.books
    assert not books.outstanding().mechanisms
    return sum(each.count for each in books.spent().mechanisms)


def test_the_gate_decides_the_noise_and_what_was_done_is_paid_for(private: Site):
    (answer,) = private.do(order())
    (perform,) = private.worker.performed
    assert (perform.privacy.clip, answer.update.num_examples, list(answer.update.metrics)) == (1.0, 1, [])
    assert perform.privacy.noise_multiplier > 1
    assert charged(private) == 1


@pytest.mark.parametrize("again", [order(), None], ids=["sent again", "another attempt"])
def test_another_attempt_at_a_round_is_answered_with_the_same_bytes_and_costs_nothing(private: Site, again):
    (first,) = private.do(order())
    retry = order()
    retry.id.attempt = 2
    private.worker.result = 99.0
    (second,) = private.do(again or retry)
    assert second.update.vector == first.update.vector
    assert second.update.id == (again or retry).id
    assert (len(private.worker.performed), charged(private)) == (1, 1)
    private = private.restarted()
    private.employ(PrivateWorker(metrics={}, result=99.0))
    private.consider(private_offer())
    (third,) = private.do(again or retry)
    assert third.update.vector == first.update.vector
    assert (len(private.worker.performed), charged(private)) == (0, 1)


@pytest.mark.parametrize(
    "deceit",
    [
        {"silent": True},
        {"claim": {"noise_multiplier": 0.5}},
        {"claim": {"count": 2}},
        {"claim": {"sampling_rate": 0.5}},
        {"num_examples": 3},
        {"metrics": {"secret": 4711.0}},
    ],
)
def test_work_that_was_not_protected_as_demanded_does_not_leave(private: Site, deceit):
    for name, value in deceit.items():
        setattr(private.worker, name, value)
    (answer,) = private.do(order())
    refusal = answer.failed.refusal
    assert (refusal.code, refusal.message) == (RefusalCode.PROTECTION_UNAVAILABLE, "see the site's log")
    assert charged(private) == 1  # that it failed was told


def test_a_failure_is_charged_and_says_nothing_of_the_data(private: Site):
    private.worker.refusal = Refusal(RefusalCode.TASK_FAILED, "the task's code failed (Patient4711Error)")
    (answer,) = private.do(order())
    assert answer.failed.refusal.message == "see the site's log"
    assert charged(private) == 1


def test_what_was_cancelled_costs_nothing(private: Site):
    private.worker.refusal = Refusal(RefusalCode.CANCELLED, "cancelled")
    assert private.do(order()) == []
    assert charged(private) == 0


def test_no_more_rounds_than_the_run_has_paid_for(private: Site):
    for round in range(1, 4):
        (answer,) = private.do(order(round))
        assert answer.HasField("update")
    (answer,) = private.do(order(4))
    assert answer.failed.refusal.code == RefusalCode.BUDGET_EXHAUSTED
    assert (len(private.worker.performed), charged(private)) == (3, 3)


def test_an_evaluation_without_noise_for_it_is_refused(private: Site):
    (answer,) = private.do(order(kind="evaluate"))
    assert answer.failed.refusal.code == RefusalCode.PROTECTION_UNAVAILABLE
    assert not private.worker.performed


def test_a_private_update_that_was_lost_is_not_made_again(private: Site):
    """Its noise would be another one, and the budget would be spent twice."""
    private.do(order())
    for path in (private.folder / OUTBOX).iterdir():
        path.write_bytes(b"")
    private = private.restarted()
    private.employ(PrivateWorker(metrics={}))
    private.consider(private_offer())
    (answer,) = private.do(order())
    assert answer.failed.refusal.code == RefusalCode.UPDATE_LOST
    assert (len(private.worker.performed), charged(private)) == (0, 1)


def test_progress_under_privacy_is_told_in_twentieths(private: Site, monkeypatch: pytest.MonkeyPatch):
    """A step's exact share of the work would tell how many examples there are."""
    monkeypatch.setattr(performing.progress, "every_s", lambda _: 0.0)
    private.worker.steps = 7
    answers = private.do(order())
    told = [answer.progress.permille for answer in answers if answer.HasField("progress")]
    assert len(told) == 7
    assert all(permille % 50 == 0 for permille in told)


# Client level: the site clips, and the coordinator that it trusts adds the noise.


@pytest.fixture
def trusting(tmp_path: Path) -> Site:
    site = Site(tmp_path, Policy(trust_coordinator=True, clip=[0.5, 2.0]))
    terms = Terms("client", 1e-5, 1.0, 3, noise_multiplier=2.0, separation=3)
    assert site.consider(offer(privacy=encode_terms(terms))).HasField("accept")
    return site


def clipped_to(clip: float, round: int = 1) -> pb.Order:
    message = order(round)
    message.clip = clip
    return message


@pytest.mark.parametrize("clip", [None, 0.5, 2.0])
def test_a_sites_whole_update_is_clipped_here_as_its_order_says_and_charged_once(trusting: Site, clip):
    trusting.worker.result = 100.0
    (answer,) = trusting.do(order() if clip is None else clipped_to(clip))
    vector = np.frombuffer(answer.update.vector.inline, np.float32).astype(np.float64)
    assert np.linalg.norm(vector) == pytest.approx(clip or 1.0, rel=1e-6)
    assert np.linalg.norm(vector) <= (clip or 1.0)
    assert (answer.update.num_examples, list(answer.update.metrics)) == (1, [])
    assert trusting.ledger.books.spent().mechanisms == (Gaussian(2.0, 1),)


@pytest.mark.parametrize("clip", [0.1, 2.5, float("nan"), float("inf"), -1.0, 0.0])
def test_a_clip_that_the_policy_does_not_allow_is_refused_whenever_it_comes(trusting: Site, clip: float):
    (answer,) = trusting.do(clipped_to(clip))
    assert answer.HasField("failed")
    assert not trusting.worker.performed


def test_a_site_rests_as_many_rounds_as_the_noise_was_made_for_also_after_a_restart(trusting: Site):
    assert [trusting.do(order(2))[0].WhichOneof("kind")] == ["update"]
    for site in (trusting, trusting.restarted()):
        site.consider(
            offer(privacy=encode_terms(Terms("client", 1e-5, 1.0, 3, noise_multiplier=2.0, separation=3)))
        )
        for round in (1, 3, 4):
            (answer,) = site.do(order(round))
            assert answer.failed.refusal.code == RefusalCode.PROTECTION_TOO_WEAK
        assert not site.worker.performed[1:]
    assert [site.do(order(5))[0].WhichOneof("kind")] == ["update"]


def test_metrics_of_an_evaluation_leave_within_their_bounds_for_a_coordinator_that_adds_noise(tmp_path: Path):
    site = Site(tmp_path, Policy(trust_coordinator=True))
    terms = Terms("client", 1e-5, 1.0, 3, 3, noise_multiplier=2.0, evaluation_noise_multiplier=9.0)
    site.consider(offer(privacy=encode_terms(terms)))
    site.worker.metrics = {"loss": 1e9, "accuracy": -3.0}
    (answer,) = site.do(order(kind="evaluate"))
    assert {each.name: each.value for each in answer.update.metrics} == {"loss": 10.0, "accuracy": 0.0}
    assert site.ledger.books.spent().mechanisms == (Gaussian(9.0, 1),)


# What a coordinator cannot get around.


def test_an_update_that_was_made_under_other_terms_never_answers_an_order(tmp_path: Path):
    """Without protection, say, before the owner asked for it: the run of the same name is another run."""
    site = Site(tmp_path)
    site.consider(offer())
    (bare,) = site.do(order())
    assert bare.update.num_examples == 3
    site = site.restarted()
    site.employ(PrivateWorker(metrics={}, result=7.0))
    assert site.consider(private_offer()).HasField("accept")
    (answer,) = site.do(order())
    assert answer.update.vector != bare.update.vector
    assert (answer.update.num_examples, charged(site)) == (1, 1)


def test_a_delta_at_which_everything_is_free_does_not_buy_more_rounds(tmp_path: Path):
    site = Site(tmp_path, Policy(max_epsilon=1000.0, max_run_epsilon=20.0))
    site.employ(PrivateWorker(metrics={}))
    terms = Terms("example", 0.99, 1.0, 2, noise_multiplier=1.0)
    assert site.consider(offer(privacy=encode_terms(terms))).HasField("accept")
    answers = [site.do(order(round))[0].WhichOneof("kind") for round in (1, 2, 3)]
    assert answers == ["update", "update", "failed"]
    assert charged(site) == 2


@pytest.mark.parametrize(("offered", "ordered"), [(pb.KIND_GRADIENT, "train"), (pb.KIND_TRAIN, "gradient")])
def test_orders_of_another_kind_than_was_offered_are_not_done(
    tmp_path: Path, offered: Any, ordered: WorkKind
):
    """What the policy says of epochs and learning rates was looked up for the kind that was offered."""
    site = Site(tmp_path)
    site.consider(offer(kind=offered))
    (answer,) = site.do(order(kind=ordered))
    assert answer.HasField("failed")
    assert not site.worker.performed


def test_the_least_noise_that_a_site_allows_is_asked_of_evaluations_too(tmp_path: Path):
    site = Site(tmp_path, Policy(min_noise_multiplier=5.0))
    for evaluation, code in ((4.9, RefusalCode.PROTECTION_TOO_WEAK), (5.0, None)):
        terms = Terms(
            "example", 1e-5, 1.0, 1, 1, noise_multiplier=6.0, evaluation_noise_multiplier=evaluation
        )
        answer = site.consider(offer(privacy=encode_terms(terms)))
        assert answer.refuse.refusal.code == (code or 0)


def test_a_site_that_was_protected_as_a_whole_counts_twice_as_much_once_an_example_of_it_is(tmp_path: Path):
    """A clip bounds what all its examples do together, and one other example can move that by two clips."""
    site = Site(tmp_path, Policy(trust_coordinator=True, max_epsilon=9.0))
    earlier, message = Terms("client", 1e-5, 1.0, 1, noise_multiplier=2.0), order()
    message.run_id = "earlier"
    site.consider(offer("earlier", privacy=encode_terms(earlier)))
    site.do(message)
    assert site.ledger.books.spent().mechanisms == (Gaussian(2.0),)
    site.employ(PrivateWorker(metrics={}))
    for noise_multiplier, kind in ((0.7, "refuse"), (30.0, "accept")):
        terms = Terms("example", 1e-5, 1.0, 1, noise_multiplier=noise_multiplier)
        assert site.consider(offer(privacy=encode_terms(terms))).WhichOneof("kind") == kind
        assert epsilon_of((Gaussian(2.0), Gaussian(noise_multiplier)), 1e-5) < 9.0
    site.do(order())
    spent = site.ledger.books.spent()
    assert spent.mechanisms == (Gaussian(1.0), Gaussian(30.0))
    assert spent.epsilon(1e-5) == pytest.approx(epsilon_of(spent.mechanisms, 1e-5))


def test_an_agent_that_is_to_end_while_it_pays_ends_and_what_it_was_about_to_send_is_paid_for(
    private: Site, monkeypatch: pytest.MonkeyPatch
):
    """The ledger's write goes on behind a task that is cancelled."""
    writing, go_on = threading.Event(), threading.Event()
    sending = private.ledger.sending

    def slow(entry: int) -> None:
        writing.set()
        assert go_on.wait(10)
        sending(entry)

    monkeypatch.setattr(private.ledger, "sending", slow)

    async def scenario() -> None:
        link: Any = private.link
        doing = asyncio.create_task(private.jobs.do(order(), link))
        await asyncio.to_thread(writing.wait, 10)
        doing.cancel()
        asyncio.get_running_loop().call_later(0.1, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await doing

    asyncio.run(scenario())
    assert not private.sent
    assert charged(private.restarted()) == 1
