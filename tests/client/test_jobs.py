"""What the agent answers to offers and orders, with a worker and a link that are a few lines each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.errors import LinkError, RefusedError, RemoteProtocolError
from fedge.privacy.terms import Terms
from fedge.refusal import Refusal, RefusalCode
from fedge.round import OrderId
from fedge.run import Work
from fedge.strategy import WorkKind
from fedge.vector import Array, Layout, Tensor, bytes_of, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_blob, encode_layout, encode_order_id, encode_terms, encode_work
from fedge.wire.limits import INLINE_BYTES
from fedge_client import jobs as jobs_module
from fedge_client import pipe_pb2 as pipe
from fedge_client import transfer
from fedge_client.download import Download
from fedge_client.jobs import OUTBOX, Jobs
from fedge_client.ledger import Ledger
from fedge_client.settings import ClientSettings, Policy
from fedge_client.spending import Spending

SLOTS = 2
SIZE, LARGE = 4, INLINE_BYTES // 4 + 1


@dataclass
class Worker:
    """The supervisor's surface: leaves `result` in the slot, or refuses."""

    loads: dict[str, pipe.Load] = field(default_factory=dict)
    segments: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    performed: list[pipe.Perform] = field(default_factory=list)
    cancels: int = 0
    result: float = 1.0
    metrics: dict[str, float] = field(default_factory=lambda: {"train_loss": 0.5})
    refusal: Refusal | None = None
    trouble: Exception | None = None
    steps: int = 0

    def free_slot(self) -> int | None:
        used = {load.slot for load in self.loads.values()}
        return next((slot for slot in range(SLOTS) if slot not in used), None)

    def vectors(self, slot: int, size: int) -> tuple[Array, Array]:
        return self.segments.setdefault(slot, (np.zeros(size, np.float32), np.zeros(size, np.float32)))

    async def load(self, load: pipe.Load) -> pipe.Loaded:
        self._behave()
        self.loads[load.run_id] = load
        return pipe.Loaded(run_id=load.run_id, train_examples=3, test_examples=2)

    async def perform(self, message: pipe.Perform, *, progress: Callable[[int, int], None]) -> pipe.Finished:
        self.performed.append(message)
        self._behave()
        for done in range(1, self.steps + 1):
            progress(done, self.steps)
        model, update = self.segments[self.loads[message.run_id].slot]
        update[:] = model + np.float32(self.result)
        metrics = [pb.Metric(name=name, value=value) for name, value in self.metrics.items()]
        return pipe.Finished(num_examples=3, metrics=metrics)

    def cancel(self) -> None:
        self.cancels += 1

    def release(self, run_id: str) -> None:
        self.loads.pop(run_id)

    def _behave(self) -> None:
        if self.refusal is not None:
            raise RefusedError(self.refusal)
        if self.trouble is not None:
            raise self.trouble


@dataclass
class Link:
    """Fetches what rides inline; keeps what is delivered; breaks `breaks` times first."""

    delivered: list[tuple[bytes, bytes]] = field(default_factory=list)
    breaks: int = 0
    breaks_in: str = "fetch deliver"
    on_fetch: Callable[[], None] = lambda: None
    on_break: Callable[[], None] = lambda: None

    closed: bool = False
    arrived: int = 0
    """Bytes of the update that came before the link broke."""

    async def fetch(self, run_id: str, download: Download) -> None:
        self.on_fetch()
        self._break("fetch")
        assert download.complete, "it rides inline"

    async def resume(self, update: pb.Update) -> int:
        return self.arrived

    async def deliver(self, update: pb.Update, vector: Array, *, offset: int = 0) -> pb.Receipt:
        assert offset == self.arrived
        self._break("deliver")
        self.delivered.append((update.SerializeToString(), vector.tobytes()))
        return pb.Receipt(run_id=update.run_id, id=update.id)

    def _break(self, where: str) -> None:
        if self.breaks and where in self.breaks_in:
            self.breaks -= 1
            self.on_break()
            raise LinkError("broken")


@dataclass
class Site:
    folder: Path
    policy: Policy = field(default_factory=lambda: Policy(max_runs=SLOTS))

    def __post_init__(self) -> None:
        (self.folder / "app.py").write_text("raise SystemExit('never imported here')")
        self.worker, self.link = Worker(), Link()
        self.sent: list[pb.ClientMessage] = []
        settings = ClientSettings(server="h:1", policy=self.policy)
        worker: Any = self.worker
        self.ledger = Ledger.open(self.folder / "ledger", "data", self.policy.delta, head_folder=self.folder)
        spending = Spending(self.ledger, self.policy)
        self.jobs = Jobs(settings, self.folder, worker, spending, self.sent.append)

    def restarted(self) -> Site:
        """Another agent in its place, which finds what this one has kept."""
        self.ledger.close()
        return Site(self.folder, self.policy)

    def consider(self, offer: pb.Offer) -> pb.ClientMessage:
        """The one answer to an offer."""
        asyncio.run(self.jobs.consider(offer))
        (answer,) = self.sent
        self.sent.clear()
        return answer

    def refuses(self, offer: pb.Offer) -> Refusal:
        refusal = self.consider(offer).refuse.refusal
        assert self.worker.free_slot() is not None or len(self.worker.loads) == SLOTS
        assert offer.run_id not in self.jobs.runs
        return Refusal(RefusalCode(refusal.code), refusal.message)

    def do(self, order: pb.Order) -> list[pb.ClientMessage]:
        link: Any = self.link
        asyncio.run(self.jobs.do(order, link))
        answers, self.sent[:] = list(self.sent), []
        return answers


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def offer(run_id: str = "run", *, task: str = "app:task", size: int = SIZE, **fields: Any) -> pb.Offer:
    layout = encode_layout(Layout((Tensor("w", (size,)),)))
    known: dict[str, Any] = {"work": encode_work(Work()), "kind": pb.KIND_TRAIN, "cohort": 1}
    fields = known | {"strategy_name": "fedavg"} | fields
    return pb.Offer(run_id=run_id, task=task, layout=layout, **fields)


def bad_layout() -> pb.Offer:
    message = offer()
    message.layout.CopyFrom(pb.Layout(tensors=[pb.Tensor(name="w")]))
    return message


def order(round: int = 1, *, kind: WorkKind = "train", model: float = 0.0, size: int = SIZE) -> pb.Order:
    blob = encode_blob(bytes_of(np.full(size, model, np.float32)), inline_bytes=1 << 30)
    return pb.Order(run_id="run", id=encode_order_id(OrderId(kind, round)), model=blob)


# Offers.


def test_a_run_is_joined_once_its_task_is_loaded_and_offered_again_it_is_just_accepted(site: Site):
    for _ in range(2):
        assert site.consider(offer(seed=9)).accept.run_id == "run"
        (load,) = site.worker.loads.values()
        assert (load.task, load.seed, load.slot) == ("app:task", 9, 0)
        assert load.layout == offer().layout


@pytest.mark.parametrize(
    ("bad", "code", "says"),
    [
        (offer(task="os:system"), RefusalCode.TASK_NOT_ALLOWED, "not in this site's task folder"),
        (offer(size=1 << 40), RefusalCode.TOO_LARGE, "this site's policy allows"),
        (offer(run_id="a\nb"), RefusalCode.TASK_UNAVAILABLE, "LimitError: see the site's log"),
        (offer(task="t" * 5000), RefusalCode.TASK_UNAVAILABLE, "LimitError: see the site's log"),
        (
            bad_layout(),
            RefusalCode.TASK_UNAVAILABLE,
            "RemoteProtocolError: see the site's log",
        ),
        (
            offer(work=pb.Work(optimizer="newton")),
            RefusalCode.TASK_UNAVAILABLE,
            "RemoteProtocolError: see the site's log",
        ),
    ],
    ids=["task", "size", "id", "long name", "layout", "work"],
)
def test_an_offer_that_cannot_be_is_answered_with_the_reason_before_anything_is_loaded(site, bad, code, says):
    refusal = site.refuses(bad)
    assert refusal.code == code
    assert says in refusal.message
    assert site.worker.loads == {}


def test_what_the_worker_says_of_a_task_is_the_answer(site: Site):
    site.worker.refusal = Refusal(RefusalCode.NO_DATA, "no data")
    assert site.refuses(offer()) == site.worker.refusal
    site.worker.refusal = None
    assert site.consider(offer()).HasField("accept")


def test_more_runs_than_the_policy_allows_are_refused_until_one_is_over(site: Site):
    for run_id in ("one", "two"):
        assert site.consider(offer(run_id)).HasField("accept")
    refusal = site.refuses(offer("three"))
    assert refusal.code == RefusalCode.TASK_UNAVAILABLE
    assert "2 runs already" in refusal.message
    site.jobs.leave("one")
    site.jobs.leave("one")
    assert site.consider(offer("three")).HasField("accept")


def test_a_run_that_ended_while_the_link_was_down_gives_up_its_place(site: Site):
    """A coordinator that was restarted offers what it still has; of the rest this site is told nothing."""
    for run_id in ("one", "two"):
        site.consider(offer(run_id))
    site.jobs.new_session()
    site.consider(offer("two"))
    assert site.consider(offer("three")).HasField("accept")
    assert set(site.jobs.runs) == set(site.worker.loads) == {"two", "three"}
    assert "2 runs already" in site.refuses(offer("four")).message


# Orders.


def test_an_order_is_done_on_the_model_that_it_names_and_answered_with_what_comes_of_it(site: Site):
    site.consider(offer())
    (answer,) = site.do(order(3, model=5.0))
    update = answer.update
    vector = np.full(SIZE, 6.0, np.float32)
    assert (update.run_id, update.num_examples) == ("run", 3)
    assert update.id == encode_order_id(OrderId("train", 3))
    assert (update.vector.inline, update.vector.digest) == (vector.tobytes(), digest_of(vector))
    assert {metric.name: metric.value for metric in update.metrics} == {"train_loss": 0.5}


def test_an_evaluation_is_answered_without_a_vector(site: Site):
    site.consider(offer())
    (answer,) = site.do(order(kind="evaluate"))
    assert answer.update.vector.size == 0
    assert answer.update.vector.HasField("inline")


@pytest.mark.parametrize("size", [SIZE, LARGE], ids=["inline", "delivered"])
def test_an_order_that_is_sent_again_is_answered_with_the_same_bytes_and_not_done_again(site, size):
    site.consider(offer(size=size))
    answers = []
    for _ in range(3):
        answers += site.do(order(size=size))
        site.worker.result += 1.0  # what it would be, done again
    assert len(site.worker.performed) == 1
    found = [answer.SerializeToString() for answer in answers] or site.link.delivered
    assert len(found) == 3
    assert found[0] == found[1] == found[2]


def test_the_next_order_is_another_one(site: Site):
    site.consider(offer())
    first, second = site.do(order(1))[0], site.do(order(2, model=1.0))[0]
    assert first.update.vector.digest != second.update.vector.digest
    assert len(site.worker.performed) == 2


def test_a_clip_that_the_run_asks_for_is_applied_here(site: Site):
    site.consider(offer(clip=1.0))
    (answer,) = site.do(order(model=99.0))
    np.testing.assert_allclose(np.frombuffer(answer.update.vector.inline, np.float32), 0.5, rtol=1e-6)


def test_an_order_of_a_run_that_was_never_joined_is_nobodys(site: Site):
    assert site.do(order()) == []
    assert site.worker.performed == []


def failed(site: Site) -> Refusal:
    (answer,) = site.do(order())
    assert (answer.failed.run_id, answer.failed.id) == ("run", order().id)
    return Refusal(RefusalCode(answer.failed.refusal.code), answer.failed.refusal.message)


def test_a_refusal_of_the_worker_or_the_gate_goes_up_by_type(site: Site):
    site.consider(offer())
    site.worker.refusal = Refusal(RefusalCode.WORKER_HUNG, "hung")
    assert failed(site) == site.worker.refusal
    site.worker.refusal, site.worker.result = None, float("nan")
    assert failed(site).code == RefusalCode.NOT_FINITE
    site.worker.result = 1.0
    assert site.do(order())[0].HasField("update"), "the same order, once it can be done"


def test_an_error_of_the_agents_own_goes_up_as_its_kind_alone(site: Site):
    site.consider(offer())
    site.worker.trouble = RemoteProtocolError("the bytes 4711")
    assert failed(site) == Refusal(RefusalCode.TASK_FAILED, "RemoteProtocolError: see the site's log")


def test_work_that_was_cancelled_is_not_answered(site: Site):
    site.consider(offer())
    site.worker.refusal = Refusal(RefusalCode.CANCELLED, "cancelled")
    assert site.do(order()) == []


def test_an_order_cancelled_while_its_model_is_fetched_never_reaches_the_worker(site: Site):
    site.consider(offer())
    site.link.on_fetch = site.jobs.cancel
    assert site.do(order(1)) == []
    assert site.worker.performed == []
    site.link.on_fetch = lambda: None
    assert site.do(order(2))[0].HasField("update"), "the next one is done"


def test_a_link_that_is_gone_is_no_failure_of_the_order(site: Site):
    site.consider(offer(size=LARGE))
    site.link.closed = True
    site.link.breaks = 1  # on the way to the model: the order will be sent again
    assert site.do(order(size=LARGE)) == []
    assert site.worker.performed == []
    assert site.do(order(size=LARGE)) == []
    assert len(site.link.delivered) == 1
    site.link.breaks, site.link.breaks_in = 1, "deliver"
    assert site.do(order(2, model=1.0, size=LARGE)) == []
    assert len(site.link.delivered) == 1
    site.link.arrived = 8  # before it broke
    assert site.do(order(2, model=1.0, size=LARGE)) == []
    assert len(site.link.delivered) == 2
    assert len(site.worker.performed) == 2


def test_while_there_is_a_link_what_breaks_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "_FIRST_S", 0.0)
    site.consider(offer(size=LARGE))
    site.link.breaks = 7
    assert site.do(order(size=LARGE)) == []
    assert len(site.link.delivered) == 1


def test_what_is_called_off_while_it_is_handed_in_is_left_there_and_not_answered(site: Site):
    site.consider(offer(size=LARGE))
    site.link.breaks = 10**6
    site.link.on_break = site.jobs.cancel
    assert site.do(order(size=LARGE)) == []
    assert site.link.delivered == []
    assert site.do(order(2, model=1.0, size=LARGE)) == [], "the next one is not called off with it"


def test_the_coordinator_hears_of_work_that_takes_long(site: Site, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(jobs_module.time, "monotonic", lambda: next(clock))
    site.worker.steps = 4
    site.consider(offer())
    wanted = order()
    wanted.deadline_s = 60.0
    *told, _ = site.do(wanted)
    assert [message.progress.permille for message in told] == [375, 500, 625, 750]
    assert told[0].progress.id == wanted.id


# An agent that was killed and is started again, in the same folder.


@pytest.mark.parametrize("size", [SIZE, LARGE])
def test_an_agent_that_starts_again_hands_in_the_bytes_that_it_had_prepared(site: Site, size: int):
    site.consider(offer(size=size))
    before = site.do(order(size=size))
    again = site.restarted()
    again.consider(offer(size=size))
    again.worker.result = 9.0  # were it done again, something else would come of it
    after = again.do(order(size=size))
    assert again.worker.performed == []
    assert after == before
    assert again.link.delivered == site.link.delivered
    assert len(again.do(order(2, model=1.0, size=size)) + again.link.delivered[1:]) == 1, "and goes on"


@pytest.mark.parametrize("damage", [b"", b"\x00" * 8, b"\x01\x00\x00\x00" * LARGE])
def test_an_agent_that_has_lost_what_it_had_prepared_says_so_once(site: Site, damage: bytes):
    site.consider(offer(size=LARGE))
    site.do(order(size=LARGE))
    (vector,) = (site.folder / OUTBOX).glob("*.vector")
    vector.write_bytes(damage)
    again = site.restarted()
    again.consider(offer(size=LARGE))
    again.worker.result = 9.0
    (answer,) = again.do(order(size=LARGE))
    assert answer.failed.refusal.code == RefusalCode.UPDATE_LOST
    again.do(order(2, model=1.0, size=LARGE))
    assert len(again.link.delivered) == 1


def test_what_was_lost_and_comes_out_the_same_again_is_not_lost(site: Site):
    site.consider(offer(size=LARGE))
    site.do(order(size=LARGE))
    (vector,) = (site.folder / OUTBOX).glob("*.vector")
    vector.unlink()
    again = site.restarted()
    again.consider(offer(size=LARGE))
    assert again.do(order(size=LARGE)) == []
    assert again.link.delivered == site.link.delivered
    assert vector.exists()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40])
def test_a_description_that_cannot_be_read_is_an_update_that_was_lost(site: Site, damage: bytes):
    site.consider(offer())
    site.do(order())
    (update,) = (site.folder / OUTBOX).glob("*.update")
    update.write_bytes(damage)
    again = site.restarted()
    again.consider(offer())
    (answer,) = again.do(order())
    assert answer.failed.refusal.code == RefusalCode.UPDATE_LOST


def test_an_order_of_the_same_name_on_another_model_is_another_order(site: Site):
    """A coordinator that has lost its last rounds gives them again, perhaps to another cohort."""
    site.consider(offer())
    site.do(order(model=1.0))
    for restart in (False, True):
        if restart:
            site = site.restarted()
            site.consider(offer())
        (answer,) = site.do(order(model=2.0))
        assert np.frombuffer(answer.update.vector.inline, np.float32).tolist() == [3.0] * SIZE


def test_a_run_that_is_over_leaves_nothing_behind(site: Site):
    site.consider(offer(size=LARGE))
    site.do(order(size=LARGE))
    assert len(list((site.folder / OUTBOX).iterdir())) == 2
    site.jobs.leave("run")
    assert list((site.folder / OUTBOX).iterdir()) == []


@pytest.mark.parametrize("size", [SIZE, LARGE])
@pytest.mark.parametrize("at", ["while it is fetched", "while it is kept"])
def test_a_run_that_is_over_in_the_middle_of_an_order_leaves_nothing_behind(
    site: Site, monkeypatch, size, at
):
    def end() -> None:
        site.jobs.cancel()
        site.jobs.leave("run")

    site.consider(offer(size=size))
    if at == "while it is fetched":
        site.link.on_fetch = end
    else:
        write = os.open

        def slow(path: Any, *rest: Any, **more: Any) -> int:
            if "run" in site.jobs.runs and str(path).endswith((".vector", ".new")):
                end()
            return write(path, *rest, **more)

        monkeypatch.setattr(os, "open", slow)
    site.do(order(size=size))
    assert "run" not in site.jobs.runs
    assert list((site.folder / OUTBOX).iterdir()) == []


def test_a_full_disk_on_the_site_costs_nothing_but_the_copy(site: Site, monkeypatch: pytest.MonkeyPatch):
    site.consider(offer())
    (site.folder / OUTBOX).chmod(0o500)
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    (answer,) = site.do(order())
    assert answer.HasField("update")


def test_runs_that_ended_unheard_of_leave_no_more_behind_than_there_may_be_runs(site: Site):
    for number in range(3 * SLOTS):
        run_id = f"run-{number}"
        site.consider(offer(run_id, size=LARGE))
        wanted = order(size=LARGE)
        wanted.run_id = run_id
        site.do(wanted)
        site.jobs.runs.clear()  # as after a restart: the coordinator does not offer it again
        site.worker.loads.clear()
    assert len(list((site.folder / OUTBOX).glob("*.update"))) == SLOTS
    assert len(list((site.folder / OUTBOX).glob("*.vector"))) == SLOTS


# Under terms of privacy.


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
    site.worker = PrivateWorker(metrics={})
    site.jobs._supervisor = site.worker  # type: ignore[assignment]  # its surface
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
    private.worker = PrivateWorker(metrics={}, result=99.0)
    private.jobs._supervisor = private.worker  # type: ignore[assignment]  # its surface
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
    private.worker = PrivateWorker(metrics={})
    private.jobs._supervisor = private.worker  # type: ignore[assignment]  # its surface
    private.consider(private_offer())
    (answer,) = private.do(order())
    assert answer.failed.refusal.code == RefusalCode.UPDATE_LOST
    assert (len(private.worker.performed), charged(private)) == (0, 1)


def test_progress_under_privacy_is_told_in_twentieths(private: Site, monkeypatch: pytest.MonkeyPatch):
    """A step's exact share of the work would tell how many examples there are."""
    monkeypatch.setattr(jobs_module.progress, "every_s", lambda _: 0.0)
    private.worker.steps = 7
    answers = private.do(order())
    told = [answer.progress.permille for answer in answers if answer.HasField("progress")]
    assert len(told) == 7
    assert all(permille % 50 == 0 for permille in told)
