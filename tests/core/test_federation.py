"""The life of a run, transition by transition: rounds, attempts, evaluations, arrivals, the end.

Generated histories under a fake driver are in test_federation_histories.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedge import federation
from fedge.cohort import Terms
from fedge.config import parse_toml
from fedge.events import (
    Accept,
    Arrived,
    Cancel,
    Close,
    DeadlinePassed,
    Failed,
    GiveUp,
    Joined,
    Left,
    OrderId,
    Progressed,
    Reject,
    Send,
    StartTimer,
)
from fedge.plan import Plan
from fedge.refusal import Refusal, RefusalCode
from fedge.run import RunConfig
from fedge.run_state import Federation, Finish, RunEffect, RunEvent, Stop

NO = Refusal(RefusalCode.TASK_FAILED, "it broke")
TERMS = Terms(2, 2, deadline_s=60.0, wait_s=90.0)
ROUNDS = Plan(rounds=3, kind="train", terms=TERMS, attempts=2)
ARRIVALS = Plan(rounds=4, kind="gradient", terms=TERMS, max_staleness=1)


def train(round: int, attempt: int = 1) -> OrderId:
    return OrderId("train", round, attempt)


def gradient(round: int) -> OrderId:
    return OrderId("gradient", round)


def judge(round: int) -> OrderId:
    return OrderId("evaluate", round)


def begin(plan: Plan, here: str = "ab") -> Federation:
    return federation.begin(plan, frozenset(here))[0]


def play(run: Federation, *events: RunEvent) -> tuple[Federation, tuple[RunEffect, ...]]:
    """The state after all events, and the effects of the last."""
    effects: tuple[RunEffect, ...] = ()
    for event in events:
        run, effects = federation.step(run, event)
    return run, effects


def answers(order: OrderId, clients: str = "ab") -> list[Arrived]:
    return [Arrived(client, order) for client in clients]


def code(effects: tuple[RunEffect, ...]) -> RefusalCode:
    (reject,) = effects
    assert isinstance(reject, Reject)
    return reject.refusal.code


# A plan.


def test_a_plan_says_in_numbers_what_a_run_says_in_words():
    text = """
        name = "a"
        task = "app:task"
        rounds = 7
        seed = 5
        [cohort]
        size = 10
        quorum = 8
        over_select = 1.3
        deadline_s = 60
        wait_s = 120
        attempts = 4
        [evaluation]
        every = 2
        clients = 3
    """
    run = parse_toml(text, RunConfig, source="run.toml")
    plan = Plan.of(run, kind="train", max_staleness=None)
    assert plan == Plan(7, "train", Terms(10, 8, 1.3, 60.0, 120.0), 5, 4, 2, 3, None)
    assert Plan.of(run, kind="gradient", max_staleness=16).max_staleness == 16


def test_without_a_number_a_whole_cohort_evaluates():
    run = parse_toml('name="a"\ntask="a:t"\nrounds=1\n[cohort]\nsize=6', RunConfig, source="run.toml")
    assert Plan.of(run, kind="train", max_staleness=None).evaluation_clients == 6


@pytest.mark.parametrize(
    ("every", "rounds"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (9, [5])]
)
def test_a_plan_evaluates_every_so_often_and_the_last(every, rounds):
    plan = replace(ROUNDS, rounds=5, evaluate_every=every)
    assert [round for round in range(1, 6) if plan.evaluates(round)] == rounds


# Rounds.


def test_a_run_begins_with_its_first_round():
    run, effects = federation.begin(ROUNDS, frozenset("ab"))
    assert effects == (
        *(Send(c, train(1)) for c in run.training.candidates),
        StartTimer(train(1), "open", 60.0),
    )
    assert run.waiting_for == ""


def test_a_run_without_clients_waits_and_says_for_what():
    run, effects = federation.begin(ROUNDS)
    assert effects == (StartTimer(train(1), "waiting", 90.0),)
    assert run.waiting_for == "waiting for clients: 0 of 2 are ready"
    run, _ = play(run, Joined("a"))
    assert run.waiting_for == "waiting for clients: 1 of 2 are ready"
    run, effects = play(run, Joined("b"))
    assert {effect.client for effect in effects if isinstance(effect, Send)} == {"a", "b"}


def test_a_round_that_closes_is_committed_and_the_next_begins_behind_it():
    run, effects = play(begin(ROUNDS), *answers(train(1)))
    assert run.committed == 1
    assert effects[:2] == (Accept("b", train(1)), Close(train(1), ("a", "b")))
    assert {type(effect) for effect in effects[2:]} == {Send, StartTimer}
    assert {effect.order for effect in effects[2:]} == {train(2)}


def test_the_last_round_ends_the_run():
    run, effects = play(begin(ROUNDS), *(event for n in (1, 2, 3) for event in answers(train(n))))
    assert effects == (Accept("b", train(3)), Close(train(3), ("a", "b")), Finish("done"))
    assert (run.status, run.reason, run.committed) == ("done", "", 3)


def test_a_round_that_is_given_up_is_tried_again_among_those_who_are_here():
    run, effects = play(begin(ROUNDS), DeadlinePassed(train(1), "open"))
    cancels = [effect for effect in effects if isinstance(effect, Cancel)]
    assert cancels == [Cancel("a", train(1)), Cancel("b", train(1))]
    assert isinstance(effects[2], GiveUp)
    assert {effect.order for effect in effects[3:]} == {train(1, 2)}
    assert run.committed == 0


def test_a_new_attempt_waits_when_too_few_are_left():
    run, effects = play(begin(ROUNDS), Left("a"), DeadlinePassed(train(1), "open"))
    assert effects[-1] == StartTimer(train(1, 2), "waiting", 90.0)
    assert run.waiting_for == "waiting for clients: 1 of 2 are ready"


def test_the_last_attempt_ends_the_run_and_cancels_each_client_once():
    """Found by review: those who were at work were cancelled twice."""
    run, effects = play(begin(ROUNDS), *(DeadlinePassed(train(1, n), "open") for n in (1, 2)))
    assert effects[:2] == (Cancel("a", train(1, 2)), Cancel("b", train(1, 2)))
    assert [type(effect) for effect in effects[2:]] == [GiveUp, Finish]
    assert run.status == "failed"
    assert run.reason == "round 1: 0 of at least 2 updates after 60 s"


def test_nobody_coming_ends_the_run_at_once_whatever_the_attempts():
    run, effects = play(begin(ROUNDS, "a"), DeadlinePassed(train(1), "waiting"))
    assert run.status == "failed"
    assert run.reason == "round 1: 1 of at least 2 clients after 90 s"
    assert effects[-1] == Finish("failed", run.reason)


def test_a_committed_round_has_all_its_attempts_again():
    run, _ = play(begin(ROUNDS), DeadlinePassed(train(1), "open"), *answers(train(1, 2)))
    run, effects = play(run, DeadlinePassed(train(2), "open"))
    assert run.status == "running"
    assert effects[-1].order == train(2, 2)


def test_timers_of_rounds_that_are_over_change_nothing():
    run, _ = play(begin(ROUNDS), *answers(train(1)))
    for event in (
        DeadlinePassed(train(1), "open"),
        DeadlinePassed(train(2), "waiting"),
        DeadlinePassed(train(2, 2), "open"),
        DeadlinePassed(judge(1), "open"),
    ):
        assert play(run, event) == (run, ())


OLD_ANSWERS = {
    "accepted, once more": ("a", train(1), RefusalCode.DUPLICATE),
    "by a stranger": ("c", train(1), RefusalCode.NOT_ASKED),
    "never given": ("a", train(3), RefusalCode.NOT_ASKED),
    "another attempt": ("a", train(2, 2), RefusalCode.NOT_ASKED),
    "another kind": ("a", gradient(2), RefusalCode.NOT_ASKED),
    "an old evaluation": ("a", judge(1), RefusalCode.LATE),
    "an evaluation to come": ("a", judge(2), RefusalCode.NOT_ASKED),
}


@pytest.mark.parametrize(("client", "order", "expected"), OLD_ANSWERS.values(), ids=OLD_ANSWERS)
def test_every_update_for_an_order_that_is_not_open_is_answered(client, order, expected):
    run, _ = play(begin(ROUNDS), *answers(train(1)))
    unchanged, effects = play(run, Arrived(client, order))
    assert unchanged == run
    assert code(effects) == expected
    assert play(run, Failed(client, order, NO)) == (run, ())


def test_updates_of_abandoned_attempts_are_late_however_many_there_were():
    """Found by review: an update for the attempt before the last was told that it had not been asked for."""
    run = begin(replace(ROUNDS, attempts=5))
    run, _ = play(run, *(DeadlinePassed(train(1, n), "open") for n in (1, 2, 3)))
    for attempt in (1, 2, 3):
        assert code(play(run, Arrived("a", train(1, attempt)))[1]) == RefusalCode.LATE
    assert code(play(run, Arrived("a", train(1, 5)))[1]) == RefusalCode.NOT_ASKED


def test_updates_of_earlier_rounds_are_late():
    run, _ = play(begin(ROUNDS), *answers(train(1)), *answers(train(2)))
    effects = play(run, Arrived("a", train(1)))[1]
    assert code(effects) == RefusalCode.LATE
    assert effects[0].refusal.message == "the train order of round 1 is over; round 3 is open"


# Evaluations.

JUDGED = replace(ROUNDS, evaluate_every=1, evaluation_clients=2)


def test_a_committed_model_is_evaluated_before_the_next_round():
    run, effects = play(begin(JUDGED), *answers(train(1)))
    assert [type(effect) for effect in effects] == [Accept, Close, Send, Send, StartTimer]
    assert {effect.order for effect in effects[2:]} == {judge(1)}
    run, effects = play(run, *answers(judge(1)))
    assert effects[:2] == (Accept("b", judge(1)), Close(judge(1), ("a", "b")))
    assert {effect.order for effect in effects[2:]} == {train(2)}


def test_an_evaluation_that_fails_costs_its_numbers_and_nothing_more():
    run, _ = play(begin(JUDGED), *answers(train(1)))
    run, effects = play(run, Failed("a", judge(1), NO), Failed("b", judge(1), NO))
    assert isinstance(effects[0], GiveUp)
    assert {effect.order for effect in effects[1:]} == {train(2)}
    assert run.status == "running"


def test_an_evaluation_that_runs_out_takes_what_is_in():
    run, _ = play(begin(JUDGED), *answers(train(1)), Arrived("a", judge(1)))
    run, effects = play(run, DeadlinePassed(judge(1), "open"))
    assert effects[:2] == (Cancel("b", judge(1)), Close(judge(1), ("a",)))
    assert {effect.order for effect in effects[2:]} == {train(2)}


def test_without_clients_an_evaluation_is_left_out():
    run, effects = play(begin(JUDGED), Arrived("a", train(1)), Left("a"), Left("b"), Arrived("b", train(1)))
    assert effects[1:] == (Close(train(1), ("a", "b")), StartTimer(train(2), "waiting", 90.0))
    assert run.evaluation is None


def test_one_who_joins_while_a_model_is_judged_takes_part_in_the_round_after():
    run, _ = play(begin(replace(JUDGED, evaluation_clients=1)), *answers(train(1)))
    run, _ = play(run, Left("a"), Left("b"), Joined("c"), Joined("a"))
    assert run.training is None
    run, _ = play(run, DeadlinePassed(judge(1), "open"))
    assert run.clients == {"a", "c"}
    assert run.training.pending == {"a", "c"}


def test_the_last_model_is_evaluated_before_the_run_is_done():
    plan = replace(JUDGED, rounds=1)
    run, effects = play(begin(plan), *answers(train(1)))
    assert run.status == "running"
    assert run.training is None
    run, effects = play(run, *answers(judge(1)))
    assert effects[-1] == Finish("done")


# The end.


@pytest.mark.parametrize("plan", [ROUNDS, ARRIVALS], ids=["rounds", "arrivals"])
def test_a_stop_cancels_all_work_and_ends_the_run(plan):
    run, effects = play(begin(plan), Stop())
    order = OrderId(plan.kind, 1)
    assert effects == (
        Cancel("a", order),
        Cancel("b", order),
        Finish("stopped", "stopped by its owner"),
    )
    assert run.status == "stopped"


def test_a_stop_during_an_evaluation_cancels_it():
    _run, effects = play(begin(JUDGED), *answers(train(1)), Arrived("a", judge(1)), Stop())
    assert effects == (Cancel("b", judge(1)), Finish("stopped", "stopped by its owner"))


def test_a_driver_that_cannot_go_on_ends_the_run_with_its_reason():
    run, effects = federation.fail(begin(ROUNDS), "the disk is full")
    assert (run.status, run.reason) == ("failed", "the disk is full")
    assert effects[-1] == Finish("failed", "the disk is full")


@pytest.mark.parametrize("plan", [ROUNDS, ARRIVALS], ids=["rounds", "arrivals"])
def test_after_the_end_an_update_is_told_so_and_nothing_else_happens(plan):
    run, _ = play(begin(plan), Stop())
    order = OrderId(plan.kind, 1)
    assert code(play(run, Arrived("a", order))[1]) == RefusalCode.RUN_ENDED
    for event in (
        Joined("c"),
        Left("a"),
        Failed("a", order, NO),
        DeadlinePassed(order, "open"),
        Stop(),
    ):
        assert play(run, event) == (run, ())


# Arrivals: every update is a step.


def test_an_update_is_accepted_closed_and_answered_with_new_work_on_arrival():
    run, effects = play(begin(ARRIVALS), Arrived("b", gradient(1)))
    assert effects == (
        Accept("b", gradient(1), staleness=0),
        Close(gradient(1), ("b",)),
        Send("b", gradient(2)),
        StartTimer(gradient(2), "open", 60.0),
    )
    assert run.at_work == {("a", 1), ("b", 2)}


def test_staleness_counts_the_steps_since_the_updates_model():
    _run, effects = play(begin(ARRIVALS), Arrived("b", gradient(1)), Arrived("a", gradient(1)))
    assert effects[:2] == (Accept("a", gradient(1), staleness=1), Close(gradient(2), ("a",)))


def test_an_update_past_the_bound_is_refused_and_its_client_sent_the_model():
    run = begin(ARRIVALS)
    run, effects = play(run, *(Arrived("b", gradient(n)) for n in (1, 2)), Arrived("a", gradient(1)))
    assert code(effects[:1]) == RefusalCode.STALE
    assert effects[0].refusal.message == ("the model moved 2 steps since this gradient's; at most 1 count")
    assert effects[1:] == (Send("a", gradient(3)),)
    assert run.committed == 2


@pytest.mark.parametrize("order", [gradient(2), train(1), OrderId("gradient", 1, 2), gradient(9)], ids=str)
def test_an_update_for_anything_but_the_clients_own_order_is_refused(order):
    """Found by review: only the round was compared, so another kind or attempt was taken for the order."""
    run = begin(ARRIVALS)
    unchanged, effects = play(run, Arrived("a", order))
    assert unchanged == run
    assert code(effects) == RefusalCode.NOT_ASKED
    assert play(run, Failed("a", order, NO)) == (run, ())


def test_the_last_step_cancels_the_others_and_ends_the_run():
    _run, effects = play(begin(ARRIVALS), *(Arrived("b", gradient(n)) for n in (1, 2, 3, 4)))
    assert effects == (
        Accept("b", gradient(4)),
        Close(gradient(4), ("b",)),
        Cancel("a", gradient(1)),
        Finish("done"),
    )


def test_one_who_joins_is_put_to_work_without_setting_back_the_clock():
    """Found by review: a client that came and went could hold the deadline off for ever."""
    run = begin(ARRIVALS)
    for _ in range(3):
        run, effects = play(run, Joined("c"))
        assert effects == (Send("c", gradient(1)),)
        run, effects = play(run, Left("c"))
        assert effects == ()


def test_one_who_is_at_work_and_says_that_it_is_ready_is_not_asked_again():
    run = begin(ARRIVALS)
    assert play(run, Joined("a")) == (run, ())


def test_one_who_failed_rests_until_the_next_step():
    run, effects = play(begin(ARRIVALS), Failed("a", gradient(1), NO))
    assert effects == ()
    run, effects = play(run, Arrived("b", gradient(1)))
    assert [effect for effect in effects if isinstance(effect, Send)] == [
        Send("a", gradient(2)),
        Send("b", gradient(2)),
    ]
    assert run.resting == frozenset()


def test_one_who_failed_and_is_ready_again_is_asked_once():
    """Found by review: it stayed among the resting and was sent a second order by the next step."""
    run, effects = play(begin(ARRIVALS), Failed("a", gradient(1), NO), Joined("a"))
    assert effects == (Send("a", gradient(1)),)
    run, effects = play(run, Arrived("b", gradient(1)))
    assert [effect for effect in effects if isinstance(effect, Send)] == [Send("b", gradient(2))]


def test_when_all_have_failed_they_are_asked_again_and_after_a_few_times_the_run_fails_with_the_last_reason():
    run, all_fail = begin(ARRIVALS), (Failed("a", gradient(1), NO), Failed("b", gradient(1), NO))
    for _ in range(ARRIVALS.attempts - 1):
        run, effects = play(run, *all_fail)
        assert effects[-3:-1] == (Send("a", gradient(1)), Send("b", gradient(1)))
        assert effects[-1] == StartTimer(gradient(1), "open", 60.0)
    run, _effects = play(run, *all_fail)
    assert run.status == "failed"
    assert run.reason == "every client failed; the last one said: task_failed: it broke"


def test_when_the_last_at_work_leaves_those_who_failed_are_asked_again():
    run, effects = play(begin(ARRIVALS), Failed("a", gradient(1), NO), Left("b"))
    assert effects == (Send("a", gradient(1)), StartTimer(gradient(1), "open", 60.0))
    assert run.status == "running"


def test_when_all_have_left_the_run_waits_for_clients_and_not_for_their_work():
    run, effects = play(begin(ARRIVALS), Left("a"), Left("b"))
    assert effects == (StartTimer(gradient(1), "waiting", 90.0),)
    assert run.waiting_for == "waiting for clients: none is at work"
    run, effects = play(run, Joined("c"))
    assert effects == (Send("c", gradient(1)), StartTimer(gradient(1), "open", 60.0))


def test_no_update_in_time_sets_everybody_to_work_anew_and_after_a_few_times_fails_the_run():
    run, _ = play(begin(ARRIVALS), Arrived("a", gradient(1)))
    assert play(run, DeadlinePassed(gradient(1), "open")) == (run, ()), "the timer of an earlier step"
    run, effects = play(run, DeadlinePassed(gradient(2), "open"))
    assert effects == (
        Cancel("b", gradient(1)),
        Send("b", gradient(2)),
        StartTimer(gradient(2), "open", 60.0),
    )
    run, effects = play(run, DeadlinePassed(gradient(2), "open"))
    assert effects == (StartTimer(gradient(2), "open", 60.0),)
    run, _ = play(run, DeadlinePassed(gradient(2), "open"))
    assert run.status == "failed"
    assert run.reason == "no update in time for round 2, 3 times in a row"


def test_an_update_in_time_makes_up_for_missed_deadlines():
    missed = DeadlinePassed(gradient(1), "open"), DeadlinePassed(gradient(1), "open")
    run, _ = play(begin(ARRIVALS), *missed)
    assert run.missed == 2
    run, _ = play(run, Arrived("a", gradient(1)))
    assert (run.status, run.missed) == ("running", 0)


def test_work_that_goes_on_outlives_the_deadline_of_a_run_without_rounds():
    run = begin(ARRIVALS)
    for permille in (1, 2, 3, 4, 5):
        run, effects = play(run, Progressed("a", gradient(1), permille), DeadlinePassed(gradient(1), "open"))
        assert effects == (StartTimer(gradient(1), "open", 60.0),)
    assert run.missed == 0
    assert play(run, Progressed("stranger", gradient(1), 5)) == (run, ())


def test_no_client_in_time_fails_the_run_and_the_timer_of_work_that_nobody_does_does_not():
    """Found by review: both waits had one timer, so a deadline under way ended the wait that replaced it."""
    run, effects = federation.begin(ARRIVALS)
    assert effects == (StartTimer(gradient(1), "waiting", 90.0),)
    busy, _ = play(run, Joined("a"))
    assert play(busy, DeadlinePassed(gradient(1), "waiting")) == (busy, ())
    idle, _ = play(busy, Left("a"))
    assert play(idle, DeadlinePassed(gradient(1), "open")) == (idle, ())
    run, _ = play(idle, DeadlinePassed(gradient(1), "waiting"))
    assert (run.status, run.reason) == ("failed", "no client in time for round 1")


def test_the_model_moves_on_while_it_is_judged_and_nobody_else_is_asked_to_judge_the_old_one():
    """Found by review: one who joined was sent the old evaluation's order with the new model."""
    plan = replace(ARRIVALS, evaluate_every=3, evaluation_clients=2)
    run = begin(plan, "a")
    run, effects = play(run, *(Arrived("a", gradient(n)) for n in (1, 2, 3)))
    assert effects[-2:] == (Send("a", judge(3)), StartTimer(judge(3), "open", 60.0))
    assert play(run, Joined("b"))[1] == (Send("b", judge(3)), Send("b", gradient(4)))
    run, _ = play(run, Arrived("a", gradient(4)))
    assert play(run, Joined("b"))[1] == ()


def test_an_evaluation_that_is_due_during_another_follows_it():
    plan = replace(ARRIVALS, evaluate_every=1)
    run, _ = play(begin(plan, "a"), *(Arrived("a", gradient(n)) for n in (1, 2, 3, 4)))
    assert (run.status, run.evaluation.order) == ("running", judge(1))
    run, effects = play(run, Arrived("a", judge(1)))
    assert effects[1:3] == (Close(judge(1), ("a",)), Send("a", judge(4)))
    assert play(run, Arrived("a", judge(4)))[1][-1] == Finish("done")
