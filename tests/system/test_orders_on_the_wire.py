"""Two scripted sites and nobody else: each message of a round is under control, so each answer is known."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from harness import Federation, initial_model, run_toml, until
from scripted import Scripted, scripted, update_of

from fedge.refusal import RefusalCode
from fedge.wire import fedge_pb2 as pb

ONES = np.ones(4, np.float32)
QUIET = "[evaluation]\nevery = 0\n"
Pair = tuple[Scripted, Scripted]


@pytest.fixture
def pair(bare: Federation) -> Iterator[Pair]:
    """Two connected sites, a and b."""
    with scripted(bare.address, bare.enrol("a")) as a, scripted(bare.address, bare.enrol("b")) as b:
        yield a, b


def accepted(receipt: pb.Receipt) -> bool:
    return not receipt.HasField("refusal")


def code(receipt: pb.Receipt) -> RefusalCode:
    assert receipt.HasField("refusal"), "the update was accepted"
    return RefusalCode(receipt.refusal.code)


def join(run_id: str, *sites: Scripted) -> list[pb.Order]:
    """Have sites join a run; the order that each is given."""
    for site in sites:
        site.join(run_id)
    return [site.order(run_id) for site in sites]


def test_an_update_that_is_sent_twice_counts_once(bare: Federation, pair: Pair) -> None:
    a, b = pair
    text = run_toml("twice", rounds=1, more=QUIET)
    with bare.submitted(text) as run_id:
        for_a, for_b = join(run_id, a, b)
        update = update_of(for_a, ONES)
        assert accepted(a.hand_in(update))
        assert code(a.hand_in(update)) == RefusalCode.DUPLICATE
        assert code(a.deliver(update_of(for_a, 5 * ONES, inline=False))) == RefusalCode.DUPLICATE
        assert accepted(b.hand_in(update_of(for_b, 3 * ONES)))
        assert bare.finish(run_id).status == "done"
        assert code(a.hand_in(update)) == RefusalCode.RUN_ENDED
        np.testing.assert_array_equal(bare.model(run_id), initial_model(text).vector + 2 * ONES)


def test_an_update_after_its_round_is_told_that_it_is_late(bare: Federation, pair: Pair) -> None:
    a, b = pair
    text = run_toml("late", rounds=2, size=1, quorum=1).replace("[cohort]", "[cohort]\nover_select = 2.0")
    with bare.submitted(text + QUIET) as run_id:
        a.join(run_id)
        first = a.order(run_id)
        b.join(run_id)
        slow = b.order(run_id)
        assert accepted(a.hand_in(update_of(first, ONES)))
        assert b.stream.next("cancel", run_id=run_id).id == slow.id
        assert code(b.hand_in(update_of(slow, 9 * ONES))) == RefusalCode.LATE
        assert accepted(b.hand_in(update_of(b.order(run_id), ONES)))
        assert code(b.hand_in(update_of(slow, 9 * ONES))) == RefusalCode.RUN_ENDED
        np.testing.assert_array_equal(bare.model(run_id), initial_model(text).vector + 2 * ONES)


def test_an_update_that_nobody_asked_for_does_not_count(bare: Federation, pair: Pair) -> None:
    a, b = pair
    with bare.submitted(run_toml("unasked", rounds=2, size=1, quorum=1, more=QUIET)) as run_id:
        (order,) = join(run_id, a)
        ids = {
            "of the next round": pb.OrderId(kind=pb.KIND_TRAIN, round=2, attempt=1),
            "of a round in a thousand years": pb.OrderId(kind=pb.KIND_TRAIN, round=2**32 - 1, attempt=1),
            "of round 0": pb.OrderId(kind=pb.KIND_TRAIN, round=0, attempt=1),
            "of another attempt": pb.OrderId(kind=pb.KIND_TRAIN, round=1, attempt=2),
            "of another kind": pb.OrderId(kind=pb.KIND_GRADIENT, round=1, attempt=1),
            "of an evaluation": pb.OrderId(kind=pb.KIND_EVALUATE, round=1, attempt=1),
        }
        codes = {name: code(a.hand_in(update_of(order, ONES, id=id))) for name, id in ids.items()}
        # A round that lies behind the open one is late; round 0 is behind every round.
        expected = dict.fromkeys(ids, RefusalCode.NOT_ASKED) | {"of round 0": RefusalCode.LATE}
        assert codes == expected
        assert code(a.hand_in(update_of(order, ONES, run_id="no-such-run"))) == RefusalCode.UNKNOWN_RUN
        # Site b never joined: even with a's order in its hands it has no part in this round.
        assert code(b.hand_in(update_of(order, 9 * ONES))) == RefusalCode.NOT_ASKED
        assert accepted(a.hand_in(update_of(order, ONES))), "and the order itself is still open"


def test_a_site_that_fails_its_order_is_replaced_and_its_reason_shown(bare: Federation, pair: Pair) -> None:
    a, b = pair
    with bare.submitted(run_toml("failing", rounds=1, size=1, quorum=1, more=QUIET)) as run_id:
        (order,) = join(run_id, a)
        b.join(run_id)
        until(lambda: bare.ready(run_id) == {"a", "b"}, "b has joined")
        refusal = pb.Refusal(code=RefusalCode.WORKER_CRASHED, message="ended by SIGSEGV\x1b[2J")
        a.stream.send(pb.ClientMessage(failed=pb.Failed(run_id=run_id, id=order.id, refusal=refusal)))
        replacement = b.order(run_id)
        assert replacement.id == order.id
        assert code(a.hand_in(update_of(order, 9 * ONES))) == RefusalCode.NOT_ASKED
        assert accepted(b.hand_in(update_of(replacement, ONES)))
        assert bare.finish(run_id).status == "done"
        details = {client.name: client.detail for client in bare.show(run_id).clients}
        assert details["a"].startswith("worker_crashed: ended by SIGSEGV")
        assert "\x1b" not in details["a"]
        assert details["b"] == ""


def test_a_round_that_fails_is_tried_again_and_the_first_attempts_updates_are_late(
    bare: Federation, pair: Pair
) -> None:
    a, b = pair
    with bare.submitted(run_toml("again", rounds=1, more=QUIET)) as run_id:
        for_a, for_b = join(run_id, a, b)
        assert accepted(a.hand_in(update_of(for_a, 9 * ONES)))
        assert code(b.hand_in(update_of(for_b, np.ones(5, np.float32)))) == RefusalCode.WRONG_LENGTH
        again = a.order(run_id), b.order(run_id)
        assert [order.id.attempt for order in again] == [2, 2]
        assert code(b.hand_in(update_of(for_b, 9 * ONES))) == RefusalCode.LATE
        assert accepted(a.hand_in(update_of(again[0], ONES)))
        assert accepted(b.hand_in(update_of(again[1], ONES)))
        assert bare.finish(run_id).status == "done"
        (row,) = bare.show(run_id).history
        assert (row.attempt, list(row.clients)) == (2, ["a", "b"])
        initial = initial_model(run_toml("again")).vector
        np.testing.assert_array_equal(bare.model(run_id), initial + ONES)


def test_a_run_whose_every_attempt_fails_ends_with_the_last_reason(bare: Federation, pair: Pair) -> None:
    a, _ = pair
    with bare.submitted(run_toml("hopeless", rounds=5, size=1, quorum=1, more=QUIET)) as run_id:
        a.join(run_id)
        for attempt in (1, 2, 3):
            order = a.order(run_id)
            assert order.id.attempt == attempt
            a.hand_in(update_of(order, ONES, num_examples=0))
        ended = a.stream.next("ended", run_id=run_id)
        assert ended.status == "failed"
        summary = bare.finish(run_id)
        assert (summary.status, summary.round) == ("failed", 0)
        assert "bad_weight" in summary.reason


def test_a_site_that_comes_back_is_given_its_order_again_and_may_hand_in_what_it_had(
    bare: Federation, pair: Pair
) -> None:
    a, b = pair
    with bare.submitted(run_toml("back", rounds=1, more=QUIET)) as run_id:
        order, for_b = join(run_id, a, b)
        assert accepted(b.hand_in(update_of(for_b, ONES)))
        a.stream.cancel()
        until(lambda: bare.ready(run_id) == {"b"}, "a is gone")
        with scripted(bare.address, bare.enrol("a")) as back:
            back.join(run_id)
            assert back.order(run_id) == order
            assert accepted(back.hand_in(update_of(order, ONES)))
            assert bare.finish(run_id).status == "done"


def test_a_site_that_never_answers_costs_its_part_when_the_deadline_passes(
    bare: Federation, pair: Pair
) -> None:
    a, b = pair
    text = run_toml("silent", rounds=1, quorum=1, more=QUIET).replace("deadline_s = 60", "deadline_s = 1.5")
    with bare.submitted(text) as run_id:
        a.join(run_id)
        order = a.order(run_id)
        b.join(run_id)
        silent = b.order(run_id)
        assert accepted(a.hand_in(update_of(order, ONES)))
        assert b.stream.next("cancel", run_id=run_id).id == silent.id
        assert bare.finish(run_id).status == "done"
        assert [list(row.clients) for row in bare.show(run_id).history] == [["a"]]


def test_an_evaluation_takes_numbers_and_no_vector(bare: Federation, pair: Pair) -> None:
    a, b = pair
    with bare.submitted(run_toml("judged", rounds=1)) as run_id:
        for order, site in zip(join(run_id, a, b), (a, b), strict=True):
            assert accepted(site.hand_in(update_of(order, ONES)))
        evaluation = a.order(run_id), b.order(run_id)
        assert {order.id.kind for order in evaluation} == {pb.KIND_EVALUATE}
        assert code(a.hand_in(update_of(evaluation[0], ONES))) == RefusalCode.WRONG_LENGTH
        judged = update_of(
            evaluation[1], ONES[:0], num_examples=3, metrics=[pb.Metric(name="loss", value=0.5)]
        )
        assert accepted(b.hand_in(judged))
        assert bare.finish(run_id).status == "done"
        (row,) = bare.show(run_id).history
        assert {metric.name: metric.value for metric in row.metrics} == {"loss": 0.5}


def test_a_gradient_that_is_too_stale_is_refused_and_its_site_given_the_new_model(
    bare: Federation, pair: Pair
) -> None:
    a, b = pair
    strategy = '[strategy]\nname = "sgd"\nmax_staleness = 0\n'
    with bare.submitted(run_toml("stale", rounds=3, more=QUIET + strategy)) as run_id:
        for_a, for_b = join(run_id, a, b)
        assert accepted(a.hand_in(update_of(for_a, ONES)))
        assert code(b.hand_in(update_of(for_b, 9 * ONES))) == RefusalCode.STALE
        fresh = b.order(run_id)
        assert (fresh.id.round, fresh.model.digest) == (2, a.order(run_id).model.digest)
        assert accepted(b.hand_in(update_of(fresh, ONES)))
        stale = update_of(fresh, 9 * ONES, inline=False)
        assert code(b.deliver(stale, b"")) == RefusalCode.NOT_ASKED
