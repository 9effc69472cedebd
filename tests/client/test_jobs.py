"""What the agent answers to offers and orders, with a worker and a link that are a few lines each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_site import LARGE, SIZE, SLOTS, Site, offer, order

from fedge.errors import RemoteProtocolError
from fedge.events import OrderId
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_order_id
from fedge_client import performing, transfer
from fedge_client.jobs import OUTBOX


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def bad_layout() -> pb.Offer:
    message = offer()
    message.layout.CopyFrom(pb.Layout(tensors=[pb.Tensor(name="w")]))
    return message


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
    monkeypatch.setattr(performing.time, "monotonic", lambda: next(clock))
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
