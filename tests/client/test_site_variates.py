"""A site's control variates: which of them corrects an order, through refusals, crashes and a coordinator's errors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_site import LARGE, SIZE, Site, offer, order

from fedge.errors import StorageError
from fedge.events import OrderId
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.variates import MOST_ATTEMPTS, Settled
from fedge.vector import Array, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_blob, encode_refusal, encode_work
from fedge_client import variates
from fedge_client.jobs import VARIATES
from fedge_client.variates import Variates

STEPS = Work(steps=2, learning_rate=0.25)


def vector(value: float) -> Array:
    return np.full(3, value, np.float32)


def train(round: int, attempt: int = 1) -> OrderId:
    return OrderId("train", round, attempt)


# What is kept.


Turn = tuple[int, str]
TURNS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from(["counts", "refused", "away", "skipped"])), max_size=30
)


@given(turns=TURNS, lag=st.integers(0, 8), lost=st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_the_one_that_corrects_is_of_the_last_update_that_counts_also_if_the_coordinator_has_lost_rounds(
    turns: list[Turn], lag: int, lost: int, tmp_path_factory: pytest.TempPathFactory
):
    """Each round is committed by some attempt, for which this site's update counts, is refused, or was not asked for;
    or it is skipped. The coordinator keeps its rounds so much later, and loses those that are not kept."""
    kept = Variates(tmp_path_factory.mktemp("variates"), max_runs=2)
    attempts: dict[int, int] = {}
    counted: dict[int, int] = {}  # the attempts by which this site is in the model
    for round, (attempt, what) in enumerate(turns, start=1):
        safe = Settled(max(0, round - 1 - lag), dict(attempts))
        expected = max(counted, default=None)
        found = kept.read("run", train(round), safe, size=3)
        assert (None if found is None else found.tolist()) == (
            None if expected is None else vector(expected * 10 + counted[expected]).tolist()
        )
        for each in range(1, attempt + (what != "away")):
            kept.write("run", train(round, each), safe, vector(round * 10 + each))
        if what == "refused":
            kept.refused("run", train(round, attempt))
        if what == "skipped":
            attempts[round] = 0
        elif attempt != 1:
            attempts[round] = attempt
        if what == "counts":
            counted[round] = attempt
        if round == lost:  # the coordinator dies here, and begins with what it has kept
            break
    at = min(lost, len(turns))
    back = max(0, at - 1 - lag)
    again = Settled(back, {round: attempt for round, attempt in attempts.items() if round <= back})
    found = kept.read("run", train(back + 1), again, size=3)
    expected = max((round for round in counted if round <= back), default=None)
    assert (None if found is None else found.tolist()) == (
        None if expected is None else vector(expected * 10 + counted[expected]).tolist()
    )


def test_what_was_refused_counts_once_the_same_update_is_handed_in_for_another_attempt(tmp_path: Path):
    kept = Variates(tmp_path / "variates", max_runs=2)
    kept.write("run", train(1), Settled(), vector(1.0))
    kept.refused("run", train(1))
    assert kept.read("run", train(2), Settled(), size=3) is None
    kept.handed_in("run", train(1, 2))
    assert kept.read("run", train(2), Settled(), size=3) is None, "by the first attempt it was not committed"
    found = kept.read("run", train(2), Settled(0, {1: 2}), size=3)
    assert found is not None
    assert found.tolist() == [1.0] * 3


def test_the_folder_does_not_grow_with_the_rounds_whatever_the_coordinator_says(tmp_path: Path):
    for kept in (0, 10**9, None):
        store = Variates(tmp_path / str(kept), max_runs=2)
        for round in range(1, 400):
            safe = Settled(round - 1 if kept is None else min(kept, round - 1))
            store.write("run", train(round), safe, vector(round))
        files = list((tmp_path / str(kept)).iterdir())
        assert len(files) <= (2 if kept is None or kept else variates._MOST)
        found = store.read("run", train(400), Settled(), size=3)
        assert found is not None
        assert found.tolist() == [399.0] * 3


def test_runs_that_nobody_ended_make_room(tmp_path: Path):
    store = Variates(tmp_path / "variates", max_runs=2)
    for run_id in ("one", "two", "three"):
        store.write(run_id, train(1), Settled(), vector(1.0))
    assert store.read("one", train(2), Settled(), size=3) is None
    assert store.read("three", train(2), Settled(), size=3) is not None
    store.forget("three")
    assert store.read("three", train(2), Settled(), size=3) is None


@pytest.mark.parametrize("damage", [b"", b"short", b"\x01" * 44, b"\x01" * 4000])
def test_one_that_is_damaged_is_none_and_that_is_said(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
):
    store = Variates(tmp_path / "variates", max_runs=2)
    store.write("run", train(1), Settled(), vector(1.0))
    (path,) = (tmp_path / "variates").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert store.read("run", train(2), Settled(), size=3) is None
    assert "control_variate_begins_anew" in caplog.text


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path):
    (tmp_path / "variates").write_text("a file")
    with pytest.raises(StorageError, match="variates: cannot make a private folder there"):
        Variates(tmp_path / "variates", max_runs=2).write("run", train(1), Settled(), vector(1.0))


# What a site does.


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def join(site: Site, *, size: int = SIZE) -> None:
    fields = {"work": encode_work(STEPS), "strategy_name": "scaffold"}
    assert site.consider(offer(size=size, **fields)).HasField("accept")


def corrected(
    round: int,
    *,
    control: float = 0.0,
    size: int = SIZE,
    kept: int = 0,
    attempts: dict[int, int] | None = None,
    attempt: int = 1,
) -> pb.Order:
    message = order(round, model=float(round), size=size)
    message.id.attempt = attempt
    blob = encode_blob(bytes_of(np.full(size, control, np.float32)), inline_bytes=1 << 30)
    message.control.CopyFrom(pb.Control(variate=blob, kept=kept, attempts=attempts or {}))
    return message


def own_after(round: int, correction: float) -> float:
    """The worker's update is the model and one: minus it over K eta, and minus the correction."""
    return -(round + 1.0) / (2 * 0.25) - correction


@pytest.mark.parametrize("size", [SIZE, LARGE])
def test_an_order_is_corrected_by_the_coordinators_variate_and_the_sites_own(site: Site, size: int):
    join(site, size=size)
    site.do(corrected(1, control=3.0, size=size))
    own = own_after(1, 3.0)
    site.do(corrected(2, control=5.0, size=size))
    assert [each[0] for each in site.worker.corrected] == [3.0, 5.0 - own]
    site.do(corrected(3, control=1.0, size=size))
    assert site.worker.corrected[2][-1] == 1.0 - own_after(2, 5.0 - own)


def test_without_a_control_variate_nothing_is_corrected_or_kept(site: Site):
    join(site)
    site.do(order(1))
    assert not site.worker.performed[0].corrected
    assert not (site.folder / VARIATES).exists()


def test_an_agent_that_is_started_again_goes_on_with_what_it_has_learned(site: Site):
    join(site)
    site.do(corrected(1, control=3.0))
    again = site.restarted()
    join(again)
    again.do(corrected(1, control=3.0))
    assert again.worker.performed == [], "it has prepared that already"
    again.do(corrected(2, control=5.0))
    assert again.worker.corrected == [[5.0 - own_after(1, 3.0)] * SIZE]


@pytest.mark.parametrize("how", ["refused", "called off", "another attempt"])
def test_an_update_that_is_in_no_model_leaves_nothing(site: Site, how: str):
    join(site)
    site.do(corrected(1, control=3.0))
    id = corrected(1).id
    match how:
        case "refused":
            late = encode_refusal(Refusal(RefusalCode.LATE, "too late"))
            site.jobs.received(pb.Receipt(run_id="run", id=id, refusal=late))
        case "called off":
            site.jobs.unwanted("run", train(1))
    attempts = {1: 2} if how == "another attempt" else {}
    site.do(corrected(2, control=5.0, attempts=attempts))
    assert site.worker.corrected[1] == [5.0] * SIZE


def test_an_update_that_came_twice_is_in_the_model(site: Site):
    join(site)
    site.do(corrected(1, control=3.0))
    twice = encode_refusal(Refusal(RefusalCode.DUPLICATE, "it is here"))
    site.jobs.received(pb.Receipt(run_id="run", id=corrected(1).id, refusal=twice))
    site.do(corrected(2, control=5.0))
    assert site.worker.corrected[1] == [5.0 - own_after(1, 3.0)] * SIZE


def test_work_that_fails_leaves_nothing(site: Site):
    join(site)
    site.worker.refusal = Refusal(RefusalCode.TASK_FAILED, "no")
    site.do(corrected(1, control=3.0))
    site.worker.refusal = None
    site.do(corrected(2, control=5.0))
    assert site.worker.corrected == [[3.0] * SIZE, [5.0] * SIZE]


def wrong_size() -> pb.Order:
    message = corrected(1)
    message.control.variate.CopyFrom(encode_blob(b"\0" * 8))
    return message


def an_evaluation() -> pb.Order:
    message = corrected(1)
    message.id.kind = pb.KIND_EVALUATE
    return message


@pytest.mark.parametrize(
    "bad",
    [wrong_size(), an_evaluation(), corrected(1, attempts=dict.fromkeys(range(MOST_ATTEMPTS + 1), 2))],
    ids=["another size", "an evaluation", "too many attempts"],
)
def test_a_control_variate_that_cannot_be_is_the_coordinators_mistake(site: Site, bad: pb.Order):
    join(site)
    (answer,) = site.do(bad)
    assert answer.failed.refusal.code == RefusalCode.TASK_FAILED
    assert "Error: see the site's log" in answer.failed.refusal.message
    assert site.worker.performed == []


def test_work_without_a_number_of_steps_has_no_control_variate(site: Site):
    assert site.consider(offer()).HasField("accept")
    (answer,) = site.do(corrected(1))
    assert answer.failed.refusal.message == "RemoteProtocolError: see the site's log"
    assert site.worker.performed == []


def test_a_folder_that_is_full_costs_the_variate_and_not_the_update(
    site: Site, caplog: pytest.LogCaptureFixture
):
    (site.folder / VARIATES).write_text("a file")
    join(site)
    (answer,) = site.do(corrected(1, control=3.0))
    assert answer.HasField("update")
    assert "control_variate_not_kept" in caplog.text


def test_a_run_that_is_over_leaves_no_variate_behind(site: Site):
    join(site)
    site.do(corrected(1, control=3.0))
    assert len(list((site.folder / VARIATES).iterdir())) == 1
    site.jobs.leave("run")
    assert list((site.folder / VARIATES).iterdir()) == []


@pytest.mark.parametrize("size", [SIZE, LARGE], ids=["inline", "delivered"])
def test_an_order_that_is_called_off_while_its_variate_is_written_leaves_nothing(
    site: Site, size: int, monkeypatch: pytest.MonkeyPatch
):
    join(site, size=size)
    write = Variates.write

    def called_off(self: Variates, *arguments: Any) -> None:
        site.jobs.cancel()
        site.jobs.unwanted("run", train(1))  # before there is anything that could be marked
        write(self, *arguments)

    monkeypatch.setattr(Variates, "write", called_off)
    assert site.do(corrected(1, control=3.0, size=size)) == []
    assert site.link.delivered == []
    monkeypatch.setattr(Variates, "write", write)
    site.do(corrected(2, control=5.0, size=size))
    assert site.worker.corrected[1] == [5.0] * size
