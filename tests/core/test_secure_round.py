"""The phases of a secure sum in a round: who is waited for, who is left out, and when it is given up, or spent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.cohort import Round, SecureTerms, Terms
from fedge.events import (
    Accept,
    Advertised,
    Arrived,
    Broken,
    Cancel,
    Close,
    Consented,
    DeadlinePassed,
    Disclose,
    Effect,
    Enlist,
    Event,
    Failed,
    GiveUp,
    Joined,
    Left,
    Mask,
    OrderId,
    Reject,
    Remind,
    Revealed,
    Send,
    Shared,
    StartTimer,
    Survive,
    Unmask,
    Unmasked,
)
from fedge.refusal import Refusal, RefusalCode
from fedge.round import open_round, resume, step

ORDER = OrderId("train", 1)
NO = Refusal(RefusalCode.TASK_FAILED, "no")
SITES = tuple("abcde")
SECURE = SecureTerms(least=3, exchange_s=10.0)
TERMS = Terms(size=5, quorum=4, deadline_s=60.0, wait_s=90.0, secure=SECURE)


def begun(terms: Terms = TERMS, clients: tuple[str, ...] = SITES) -> Round:
    return open_round(ORDER, terms, clients, seed=0)[0]


def after(round: Round, *events: Event) -> tuple[Round, list[Effect]]:
    effects: list[Effect] = []
    for event in events:
        round, more = step(round, event)
        effects += more
    return round, effects


def each(kind: type[Event], clients: str | tuple[str, ...] = SITES) -> list[Event]:
    return [kind(client, ORDER) for client in clients]  # type: ignore[call-arg]


def over(round: Round) -> DeadlinePassed:
    return DeadlinePassed(ORDER, round.phase)


def sharing(terms: Terms = TERMS, clients: tuple[str, ...] = SITES) -> Round:
    return after(begun(terms, clients), *each(Advertised, clients))[0]


def opened() -> Round:
    return after(sharing(), *each(Shared))[0]


def consenting() -> Round:
    return after(opened(), *each(Arrived))[0]


def revealing() -> Round:
    return after(consenting(), *each(Consented, "abcd"))[0]


def of(kind: type[Effect], effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def test_a_round_goes_through_its_phases_when_everybody_answers():
    round, effects = open_round(ORDER, TERMS, SITES, seed=0)
    assert round.phase == "joining"
    assert {effect.client for effect in effects if isinstance(effect, Send)} == set(SITES)
    assert effects[-1] == StartTimer(ORDER, "joining", 10.0)
    round, effects = after(round, *each(Advertised))
    assert effects == [Enlist(ORDER, SITES), StartTimer(ORDER, "sharing", 10.0)]
    round, effects = after(round, *each(Shared))
    assert effects == [Mask(ORDER, SITES), StartTimer(ORDER, "open", 60.0)]
    round, effects = after(round, *each(Arrived))
    assert effects[-2:] == [Survive(ORDER, SITES), StartTimer(ORDER, "consenting", 10.0)]
    assert len(of(Accept, effects)) == 5
    round, effects = after(round, *each(Consented, "abcd"))  # four of five are enough
    assert effects == [Disclose(ORDER, tuple("abcd")), StartTimer(ORDER, "revealing", 10.0)]
    round, effects = after(round, *each(Revealed, "abcd"))
    assert effects == [Unmask(ORDER, SITES)]
    round, effects = after(round, Unmasked(ORDER))
    assert (round.phase, effects) == ("closed", [Close(ORDER, SITES)])


# joining


def test_somebody_else_is_asked_in_place_of_one_that_fails_before_the_roster_is_fixed():
    round = begun(replace(TERMS, size=4), SITES)
    (spare,) = set(SITES) - round.pending
    (first, *rest) = sorted(round.pending)
    round, effects = after(round, Failed(first, ORDER, NO))
    assert effects == [Send(spare, ORDER)]
    round, effects = after(round, *each(Advertised, (*rest, spare)))
    assert effects[0] == Enlist(ORDER, tuple(sorted((*rest, spare))))


def test_nobody_is_asked_once_the_roster_is_fixed():
    for round in (sharing(), opened(), consenting(), revealing()):
        again, effects = after(round, Joined("z"))
        assert (again, effects) == (round, [])
    round, effects = after(opened(), Failed("a", ORDER, NO), Joined("z"))
    assert effects == []
    assert "z" not in round.candidates


def test_a_sum_has_no_more_members_than_were_asked_for_though_one_is_back_that_was_replaced():
    round = begun(clients=(*SITES, "f"))
    first = min(round.pending)
    round, _ = after(round, Left(first), Joined(first))
    assert len(round.pending) == 6
    round, effects = after(round, *each(Advertised, tuple(sorted(round.pending))))
    (enlist,) = of(Enlist, effects)
    assert len(enlist.clients) == TERMS.asked == 5  # type: ignore[attr-defined]
    assert len(of(Cancel, effects)) == 1


def test_whoever_has_no_keys_to_show_in_time_is_left_out():
    round, effects = after(begun(), *each(Advertised, "abcd"), over(begun()))
    assert effects == [
        Cancel("e", ORDER),
        Enlist(ORDER, tuple("abcd")),
        StartTimer(ORDER, "sharing", 10.0),
    ]
    assert round.failed == {"e"}


def test_a_round_with_too_few_keys_in_time_is_given_up():
    round, effects = after(begun(), *each(Advertised, "abc"), over(begun()))
    assert round.phase == "abandoned"
    assert effects[-1] == GiveUp(ORDER, "3 of at least 4 clients have shown keys")


def test_a_quorum_below_what_a_secure_sum_needs_does_not_begin_a_round():
    terms = replace(TERMS, size=3, quorum=1)
    assert open_round(ORDER, terms, ("a", "b"), seed=0)[0].phase == "waiting"


def test_an_update_before_the_members_have_shared_is_refused():
    for round in (begun(), sharing()):
        _, effects = after(round, Arrived("a", ORDER))
        assert [effect.refusal.code for effect in effects if isinstance(effect, Reject)] == [
            RefusalCode.NOT_ASKED
        ]


def test_keys_of_somebody_who_was_not_asked_or_twice_change_nothing():
    round = after(begun(), Advertised("a", ORDER))[0]
    assert after(round, Advertised("a", ORDER), Advertised("z", ORDER)) == (round, [])


# sharing


def test_a_member_that_is_cut_off_before_it_has_shared_is_not_waited_for():
    _, effects = after(sharing(), *each(Shared, "abcd"), Left("e"))
    assert effects == [Mask(ORDER, tuple("abcd")), StartTimer(ORDER, "open", 60.0)]


def test_a_member_that_is_cut_off_is_waited_for_where_it_is_needed():
    round, effects = after(sharing(), *each(Shared, "abc"), Left("d"), Left("e"))
    assert effects == []
    round, effects = after(round, Joined("d"))
    assert effects == [Send("d", ORDER), Remind("d", ORDER)]
    _, effects = after(round, Shared("d", ORDER))
    assert effects[0] == Mask(ORDER, tuple("abcd"))


def test_one_that_hangs_costs_one_exchange():
    round, effects = after(sharing(), *each(Shared, "abcd"))
    assert effects == []
    _, effects = after(round, over(round))
    assert effects[:2] == [Cancel("e", ORDER), Mask(ORDER, tuple("abcd"))]


def test_too_few_that_share_are_the_end_of_the_attempt_and_nothing_is_spent():
    _, effects = after(sharing(), *each(Shared, "abc"), over(sharing()))
    give_up = effects[-1]
    assert isinstance(give_up, GiveUp)
    assert not give_up.spent
    assert "3 of 5 members of the secure sum have shared their seeds" in give_up.reason


# open


def test_a_member_that_drops_out_of_the_work_is_not_replaced_and_the_rest_are_enough():
    round, effects = after(opened(), *each(Arrived, "abcd"), Failed("e", ORDER, NO))
    assert effects[-2] == Survive(ORDER, tuple("abcd"))
    assert round.phase == "consenting"


def test_fewer_updates_than_the_threshold_are_never_summed():
    round, effects = after(opened(), *each(Arrived, "abc"), *[Failed(each, ORDER, NO) for each in "de"])
    assert round.phase == "abandoned"
    assert not of(Survive, effects)


def test_the_deadline_goes_on_with_the_threshold_and_cancels_the_rest():
    _, effects = after(opened(), *each(Arrived, "abcd"), over(opened()))
    assert effects[-3:] == [
        Cancel("e", ORDER),
        Survive(ORDER, tuple("abcd")),
        StartTimer(ORDER, "consenting", 10.0),
    ]


def test_a_member_that_was_cut_off_goes_on_with_what_it_has_missed():
    round, effects = after(opened(), Left("a"), Joined("a"))
    assert effects == [Send("a", ORDER), Remind("a", ORDER)]
    assert "a" in round.pending


# Blame.


def blamed_by(*pairs: tuple[str, str]) -> tuple[str, ...]:
    round = opened()
    for accuser, culprit in pairs:
        round, effects = after(round, Failed(accuser, ORDER, NO, (culprit,)))
        if round.phase == "abandoned":
            (give_up,) = of(GiveUp, effects)
            assert isinstance(give_up, GiveUp)
            return give_up.culprits
    raise AssertionError("not given up")


def test_whom_two_blame_is_left_out_of_the_next_attempt():
    assert blamed_by(("a", "e"), ("b", "e")) == ("e",)


def test_of_two_of_whom_one_blames_the_other_both_are():
    assert blamed_by(("a", "e"), ("b", "d")) == ("a", "b", "d", "e")


def test_an_accuser_alone_costs_its_own_part_and_nothing_more():
    _, effects = after(opened(), Failed("a", ORDER, NO, ("e",)), *each(Arrived, "bcde"))
    assert Survive(ORDER, tuple("bcde")) in effects


# consenting and revealing


def test_an_update_behind_the_survivors_is_late():
    round = after(opened(), *each(Arrived, "abcd"), over(opened()))[0]
    _, effects = after(round, Arrived("e", ORDER))
    assert [effect.refusal.code for effect in effects if isinstance(effect, Reject)] == [RefusalCode.LATE]


def test_a_late_consent_is_answered_with_the_consents():
    _, effects = after(revealing(), Consented("e", ORDER))
    assert effects == [Disclose(ORDER, ("e",))]


def test_a_survivor_that_is_back_is_told_again():
    for round in (consenting(), revealing()):
        assert after(round, Joined("a"))[1] == [Remind("a", ORDER)]


def test_too_few_consents_are_the_end_of_the_attempt_and_nothing_is_spent():
    _, effects = after(consenting(), *each(Consented, "abc"), over(consenting()))
    assert effects == [GiveUp(ORDER, effects[0].reason)]  # type: ignore[union-attr]
    assert "3 of 5 members of the secure sum have consented" in effects[0].reason  # type: ignore[union-attr]


def test_too_few_reveals_spend_the_round():
    _, effects = after(revealing(), *each(Revealed, "abc"), over(revealing()))
    assert isinstance(effects[-1], GiveUp)
    assert effects[-1].spent


def test_survivors_that_fail_end_the_attempt_as_soon_as_too_few_are_left():
    round, effects = after(consenting(), Failed("a", ORDER, NO))
    assert (round.phase, effects) == ("consenting", [])
    round, effects = after(round, Failed("b", ORDER, NO))
    assert isinstance(effects[-1], GiveUp)
    assert not effects[-1].spent
    round, effects = after(revealing(), Failed("a", ORDER, NO), Failed("b", ORDER, NO))
    assert isinstance(effects[-1], GiveUp)
    assert effects[-1].spent


def test_shares_that_rebuild_nothing_are_tried_again_with_one_more_and_then_given_up():
    round = after(revealing(), *each(Revealed, "abcd"))[0]
    round, effects = after(round, Broken(ORDER, "wrong shares", ("e",)))
    assert effects == []
    round, effects = after(round, Revealed("e", ORDER))
    assert effects == [Unmask(ORDER, SITES)]
    round, effects = after(round, Broken(ORDER, "wrong shares", ("e",)))
    assert effects == [GiveUp(ORDER, "wrong shares", ("e",), spent=True)]


def test_the_deadline_does_not_end_a_round_whose_masks_are_coming_off():
    round, effects = after(unmasking := after(revealing(), *each(Revealed, "abcd"))[0], over(unmasking))
    assert effects == []
    assert after(round, Unmasked(ORDER))[0].phase == "closed"


@pytest.mark.parametrize("late", [False, True])
def test_behind_the_deadline_nobody_waits_for_more_shares(late: bool):
    revealed = after(revealing(), *each(Revealed, "abcd" if late else "abc"))[0]
    round, effects = after(revealed, over(revealed))
    if late:
        round, effects = after(round, Broken(ORDER, "wrong shares", ("e",)))
        assert effects == [GiveUp(ORDER, "wrong shares", ("e",), spent=True)]
    else:
        assert isinstance(effects[-1], GiveUp)
    assert round.phase == "abandoned"


def test_a_sum_that_cannot_be_ends_the_round_at_once():
    round = after(revealing(), *each(Revealed, "abcd"))[0]
    effects = after(round, Broken(ORDER, "no such sum", final=True))[1]
    assert effects == [GiveUp(ORDER, "no such sum", spent=True)]


def test_a_coordinator_that_trusts_itself_asks_for_no_consent():
    terms = replace(TERMS, secure=replace(SECURE, consistency=False))
    round = after(sharing(terms), *each(Shared))[0]
    round, effects = after(round, *each(Arrived))
    assert effects[-3:] == [
        Survive(ORDER, SITES),
        Disclose(ORDER, SITES),
        StartTimer(ORDER, "revealing", 10.0),
    ]


def test_a_driver_that_starts_again_gives_the_attempt_up_and_after_a_reveal_the_round():
    for round, spent in (
        (begun(), False),
        (sharing(), False),
        (opened(), False),
        (consenting(), False),
        (revealing(), True),
    ):
        again, effects = resume(round, SITES, SITES)
        assert again.phase == "abandoned"
        assert isinstance(effects[-1], GiveUp)
        assert effects[-1].spent is spent


# Shards.


def in_shards(*sizes: int) -> tuple[Round, list[list[str]]]:
    shards = [[f"{at}{n}" for n in range(size)] for at, size in enumerate(sizes)]
    clients = tuple(name for shard in shards for name in shard)
    terms = replace(TERMS, size=len(clients), quorum=4)
    round, _ = after(
        begun(terms, clients),
        *[Advertised(name, ORDER, at) for at, shard in enumerate(shards) for name in shard],
    )
    return round, shards


def test_a_shard_that_is_left_with_too_few_is_left_out_and_the_others_go_on():
    round, (first, second) = in_shards(6, 5)
    round, effects = after(round, *each(Shared, (*first, *second)))
    round, effects = after(
        round, *each(Arrived, (*first, *second[:3])), *[Failed(name, ORDER, NO) for name in second[3:]]
    )
    assert of(Survive, effects) == [Survive(ORDER, tuple(first))]


def test_a_shard_smaller_than_a_sum_may_be_is_left_out_from_the_beginning():
    round, (first, second) = in_shards(6, 2)
    assert round.pending == set(first)
    assert round.failed == set(second)


def test_shards_reach_their_thresholds_each_for_itself():
    round, (first, second) = in_shards(6, 6)
    round, _ = after(round, *each(Shared, (*first, *second)), *each(Arrived, (*first, *second)))
    round, effects = after(round, *each(Consented, (*first, *second[:4])))
    assert not of(Disclose, effects)
    kept, effects = after(round, over(round))  # the second has 4 of the 5 that it needs
    assert of(Disclose, effects) == [Disclose(ORDER, tuple(first))]
    assert kept.survivors == set(first)
    _, effects = after(round, Consented(second[4], ORDER))
    assert len(of(Disclose, effects)) == 1


# Laws.


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_history_comes_to_an_end_and_never_below_the_threshold(data: st.DataObject):
    terms = replace(TERMS, quorum=data.draw(st.integers(1, 5)))
    round, effects = open_round(ORDER, terms, data.draw(st.permutations(SITES)), seed=0)
    seen: list[Effect] = list(effects)
    kinds = [Advertised, Shared, Arrived, Consented, Revealed, Left, Joined]
    for _ in range(data.draw(st.integers(0, 60))):
        kind = data.draw(st.sampled_from([*kinds, Failed, Broken, Unmasked, DeadlinePassed]))
        client = data.draw(st.sampled_from([*SITES, "z"]))
        event: Event
        if kind in (Left, Joined):
            event = kind(client)
        elif kind is Failed:
            event = Failed(client, ORDER, NO, data.draw(st.sampled_from([(), ("a",), ("e",)])))
        elif kind is Broken:
            event = Broken(ORDER, "broken", ("a",))
        elif kind is Unmasked:
            event = Unmasked(ORDER)
            if not round.unmasking:
                continue
        elif kind is DeadlinePassed:
            event = over(round)
        else:
            event = kind(client, ORDER)
        if kind is Broken and not round.unmasking:
            continue
        before = round
        round, effects = step(round, event)
        seen += effects
        if isinstance(event, Arrived):
            assert len(of(Accept, list(effects))) + len(of(Reject, list(effects))) == 1
        if round.phase not in ("waiting", "joining", "closed", "abandoned"):
            assert round.phase != "open" or len(dict(round.enlisted)) >= 3
        if before.phase in ("closed", "abandoned"):
            assert round == before
    for _ in range(20):  # time passes, and masks come off
        if round.phase in ("closed", "abandoned"):
            break
        event = Unmasked(ORDER) if round.unmasking else over(round)
        round, effects = step(round, event)
        seen += effects
    assert round.phase in ("closed", "abandoned")
    ends = of(Close, seen) + of(GiveUp, seen)
    assert len(ends) == 1
    if isinstance(ends[0], Close):
        needed = SECURE.needed(len(dict(round.enlisted)))
        assert len(ends[0].clients) >= max(needed, terms.quorum)
        assert len(round.revealed) >= needed
        assert set(ends[0].clients) <= {e.client for e in of(Accept, seen) if isinstance(e, Accept)}
    if isinstance(ends[0], GiveUp) and not of(Disclose, seen):
        assert not ends[0].spent


@pytest.mark.parametrize("phase", ["joining", "sharing", "open", "consenting", "revealing"])
def test_a_round_in_any_phase_is_kept_as_it_is(phase: str):
    from fedge import federation
    from fedge.plan import Plan
    from fedge_server.store.machine import decode_machine, encode_machine

    rounds = {"joining": begun, "sharing": sharing, "open": opened, "consenting": consenting}
    round = rounds.get(phase, revealing)()
    run = replace(federation.begin(Plan(1, "train", TERMS))[0], training=round)
    assert decode_machine(encode_machine(run)) == run
