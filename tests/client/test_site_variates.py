"""A site's control variates: which of them corrects an order, through refusals, crashes and a coordinator's errors."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_site import LARGE, SIZE, Site, offer, order

from fedge.errors import StorageError
from fedge.events import OrderId
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.variates import Settled
from fedge.vector import Array, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_blob, encode_order_id, encode_work
from fedge_client import pipe_pb2 as pipe
from fedge_client import variates
from fedge_client.jobs import VARIATES
from fedge_client.variates import Variates

STEPS = Work(steps=2, learning_rate=0.25)


def vector(value: float) -> Array:
    return np.full(3, value, np.float32)


def train(round: int, attempt: int = 1) -> OrderId:
    return OrderId("train", round, attempt)


# What is kept.

TERMS = b"terms"


def read(kept: Variates, settled: Settled) -> float | None:
    found = kept.read("run", TERMS, settled, size=3)
    return None if found is None else float(found[0])


Turn = tuple[int, str]
TURNS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from(["counts", "lost on its way", "away"])), max_size=25
)


@given(turns=TURNS, after=TURNS, lag=st.integers(0, 8))
@settings(max_examples=150, deadline=None)
def test_what_corrects_is_of_the_last_update_in_the_model_also_if_the_coordinator_has_lost_rounds(
    turns: list[Turn], after: list[Turn], lag: int, tmp_path_factory: pytest.TempPathFactory
):
    """Each round is committed by some attempt. This site's update of it comes into the model, or is lost on its way, or
    was not asked for. The coordinator keeps its rounds so much later; it dies, and others happen from there on."""
    kept = Variates(tmp_path_factory.mktemp("variates"), max_runs=2)
    counted: dict[int, tuple[int, float]] = {}  # rounds, with attempt and what was made for it
    number = 0.0

    def go_on(first: int, rounds: list[Turn]) -> int:
        nonlocal number
        for round, (attempt, what) in enumerate(rounds, start=first):
            latest = max(counted, default=None)
            settled = Settled(
                max(0, round - 1 - lag), (latest, counted[latest][0]) if latest is not None else None
            )
            assert read(kept, settled) == (counted[latest][1] if latest is not None else None)
            for each in range(1, attempt + (what != "away")):
                number += 1
                kept.write("run", TERMS, train(round, each), settled, vector(number))
            if what == "counts":
                counted[round] = attempt, number
        return max(0, first + len(rounds) - 2 - lag)

    safe = go_on(1, turns)
    for lost in [round for round in counted if round > safe]:
        del counted[lost]
    go_on(safe + 1, after)


def test_an_update_that_is_handed_in_for_another_attempt_is_of_that_one(tmp_path: Path):
    kept = Variates(tmp_path / "variates", max_runs=2)
    kept.write("run", TERMS, train(1), Settled(), vector(1.0))
    kept.handed_in("run", TERMS, train(1, 2))
    assert read(kept, Settled(0, (1, 1))) is None
    assert read(kept, Settled(0, (1, 2))) == 1.0


def test_what_was_made_under_other_terms_is_of_no_use(tmp_path: Path):
    kept = Variates(tmp_path / "variates", max_runs=2)
    kept.write("run", b"other", train(1), Settled(), vector(1.0))
    assert read(kept, Settled(0, (1, 1))) is None
    kept.write("run", TERMS, train(2), Settled(), vector(1.0))
    assert len(list((tmp_path / "variates").iterdir())) == 1


@pytest.mark.parametrize("lag", [0, 3, 10**9], ids=["at once", "later", "never"])
def test_the_folder_does_not_grow_with_the_rounds_whatever_the_coordinator_says(tmp_path: Path, lag: int):
    store = Variates(tmp_path / "variates", max_runs=2)
    for round in range(1, 300):
        counted = (round - 1, 1) if round > 1 else None
        store.write("run", TERMS, train(round), Settled(max(0, round - 1 - lag), counted), vector(round))
    assert len(list((tmp_path / "variates").iterdir())) <= (2 if not lag else variates._MOST)
    assert read(store, Settled(0, (299, 1))) == 299.0


def test_runs_that_nobody_ended_make_room(tmp_path: Path):
    store = Variates(tmp_path / "variates", max_runs=2)
    for run_id in ("one", "two", "three"):
        store.write(run_id, TERMS, train(1), Settled(), vector(1.0))
    assert store.read("one", TERMS, Settled(0, (1, 1)), size=3) is None
    assert store.read("three", TERMS, Settled(0, (1, 1)), size=3) is not None
    store.forget("three")
    assert store.read("three", TERMS, Settled(0, (1, 1)), size=3) is None


@pytest.mark.parametrize("damage", [b"", b"short", b"\x01" * 44, b"\x01" * 4000])
def test_one_that_is_damaged_is_none_and_that_is_said(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
):
    store = Variates(tmp_path / "variates", max_runs=2)
    store.write("run", TERMS, train(1), Settled(), vector(1.0))
    (path,) = (tmp_path / "variates").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert read(store, Settled(0, (1, 1))) is None
    assert "own_state_begins_anew" in caplog.text


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path):
    (tmp_path / "variates").write_text("a file")
    with pytest.raises(StorageError, match="variates: cannot make a private folder there"):
        Variates(tmp_path / "variates", max_runs=2).write("run", TERMS, train(1), Settled(), vector(1.0))


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
    counted: tuple[int, int] | None = None,
) -> pb.Order:
    message = order(round, model=float(round), size=size)
    blob = encode_blob(bytes_of(np.full(size, control, np.float32)), inline_bytes=1 << 30)
    message.control.CopyFrom(pb.Control(variate=blob))
    if counted is not None:
        message.control.counted.CopyFrom(encode_order_id(train(*counted)))
    return message


def own_after(round: int, correction: float) -> float:
    """The worker's update is the model and one: minus it over K eta, and minus the correction."""
    return -(round + 1.0) / (2 * 0.25) - correction


@pytest.mark.parametrize("size", [SIZE, LARGE])
def test_an_order_is_corrected_by_the_coordinators_variate_and_the_sites_own(site: Site, size: int):
    join(site, size=size)
    site.do(corrected(1, control=3.0, size=size))
    own = own_after(1, 3.0)
    site.do(corrected(2, control=5.0, size=size, counted=(1, 1)))
    assert [each[0] for each in site.worker.corrected] == [3.0, 5.0 - own]
    site.do(corrected(3, control=1.0, size=size, counted=(2, 1)))
    assert site.worker.corrected[2][-1] == 1.0 - own_after(2, 5.0 - own)


def test_without_a_control_variate_nothing_is_corrected_or_kept(site: Site):
    join(site)
    site.do(order(1))
    assert site.worker.performed[0].own == pipe.OWN_NOTHING
    assert not (site.folder / VARIATES).exists()


def test_an_agent_that_is_started_again_goes_on_with_what_it_has_learned(site: Site):
    join(site)
    site.do(corrected(1, control=3.0))
    again = site.restarted()
    join(again)
    again.do(corrected(1, control=3.0))
    assert again.worker.performed == [], "it has prepared that already"
    again.do(corrected(2, control=5.0, counted=(1, 1)))
    assert again.worker.corrected == [[5.0 - own_after(1, 3.0)] * SIZE]


def test_an_update_that_is_in_no_model_leaves_nothing(site: Site):
    """Whatever became of it on its way: a coordinator says which of them it has."""
    join(site)
    site.do(corrected(1, control=3.0))
    site.do(corrected(2, control=5.0))
    assert site.worker.corrected[1] == [5.0] * SIZE
    site.do(corrected(3, control=7.0, counted=(1, 1)))
    site.do(corrected(4, control=7.0, counted=(2, 1)))
    assert [each[0] for each in site.worker.corrected[2:]] == [7.0, 7.0], "what counts later was not kept"


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
    [wrong_size(), an_evaluation(), corrected(1, counted=(1, 1)), corrected(1, counted=(0, 0))],
    ids=["another size", "an evaluation", "a round to come", "no attempt"],
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
    assert "own_state_not_kept" in caplog.text


def test_a_run_that_is_over_leaves_no_variate_behind(site: Site):
    join(site)
    site.do(corrected(1, control=3.0))
    assert len(list((site.folder / VARIATES).iterdir())) == 1
    site.jobs.leave("run")
    assert list((site.folder / VARIATES).iterdir()) == []


def told(order: pb.Order, counted: tuple[int, int] | None = None) -> pb.Order:
    """An order that says which of this site's updates counts."""
    order.control.CopyFrom(pb.Control())
    if counted is not None:
        order.control.counted.CopyFrom(encode_order_id(train(*counted)))
    return order


def test_a_site_goes_on_with_the_layers_of_the_update_that_counts(site: Site):
    site.worker.personal = 2
    assert site.consider(offer()).HasField("accept")
    site.do(told(order(1)))
    site.do(told(order(2, model=1.0), (1, 1)))
    site.do(told(order(3, model=2.0), (1, 1)))
    site.do(told(order(3, kind="evaluate", model=3.0), (3, 1)))
    site.do(told(order(4, model=3.0)))
    assert site.worker.began == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]
    site.jobs.leave("run")
    assert not list((site.folder / VARIATES).iterdir())


@pytest.mark.parametrize("personal", [0, 2])
def test_an_order_that_does_not_fit_the_sites_layers_is_refused(site: Site, personal: int):
    site.worker.personal = personal
    assert site.consider(offer()).HasField("accept")
    (answer,) = site.do(order(1) if personal else told(order(1)))
    assert site.worker.performed == []
    assert answer.HasField("failed")
