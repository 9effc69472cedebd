"""What a coordinator may try around a secure sum: rounds again, other directories, other orders, too much of anything.

As in test_attacks_in_sums.py, a real agent over real TLS: it says no, reveals nothing, and is there for the next round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from authorities import new_authority
from malicious import OTHERS, SECURE, Attacked, Play, Run

from fedge.refusal import RefusalCode
from fedge.secagg.directory import Directory
from fedge.signing import SignedDirectory, make_signing_key, public_bytes, signing_key_of_pem
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import MAX_MESSAGE_BYTES
from fedge_client.secure_sessions import MAX_WAITING

FRIEND = OTHERS[0]


@pytest.fixture
def run(attack: Attacked) -> Iterator[Run]:
    run = Run.begun(attack.coordinator)
    yield run
    run.end()


def another_key() -> bytes:
    return public_bytes(signing_key_of_pem(make_signing_key()))


# ---- a round again ----


@pytest.mark.parametrize(("attempt", "scale"), [(1, 2.0), (2, 1.0), (2, 2.0)])
def test_a_round_whose_sum_was_opened_is_never_summed_again(run: Run, attempt: int, scale: float):
    """Of the same sites but one, say: the difference of both sums is that one's update."""
    run.play().ends_well()
    again = run.play(round=1, attempt=attempt, scale=scale)
    again.run.coordinator.tell(order=again.message)
    failed = again.hear("failed")
    assert failed.refusal.code == RefusalCode.ROUND_SPENT
    run.play(round=2).ends_well()
    assert len(again.heard("advertise")) == (1 if attempt == 1 else 0)  # that of the sum which was opened


def test_a_round_before_the_last_is_not_summed_any_more(run: Run):
    run.play(round=5).ends_well()
    late = run.play(round=3)
    run.coordinator.tell(order=late.message)
    late.run.round = 5
    late.is_refused(RefusalCode.ROUND_SPENT, "train round 5")


def test_another_order_under_the_name_of_the_first_is_refused(run: Run):
    """On another model, as after a coordinator's crash: this attempt's keys are shown, and are not made again."""
    first = run.play()
    first.envelopes()
    other = run.play(round=1, scale=2.0)
    run.coordinator.tell(order=other.message)
    other.is_refused(RefusalCode.UPDATE_LOST, handed_in=True)
    assert (len(other.heard("advertise")), len(other.heard("update"))) == (1, 1)  # of the first


def test_an_agent_that_was_started_again_goes_on_with_no_sum_of_before(attack: Attacked, run: Run):
    """Neither one that was opened, nor one that was not: its keys are gone, and new ones would be other masks."""
    run.play().ends_well()
    open_one = run.play()
    open_one.envelopes()
    attack.restart()
    run.coordinator.tell(offer=run.offer)
    run.coordinator.hear("accept", run.is_about, after=1)
    run.coordinator.tell(order=open_one.message)
    assert open_one.hear("failed").refusal.code == RefusalCode.UPDATE_LOST
    spent = run.play(round=1, attempt=2)
    run.coordinator.tell(order=spent.message)
    spent.run.round = 2
    spent.is_refused(RefusalCode.ROUND_SPENT)
    assert len(open_one.heard("advertise")) == 1


def test_messages_of_a_sum_that_is_over_are_not_answered(run: Run):
    given_up = run.play()
    consents = given_up.survivors()
    run.coordinator.tell(cancel=given_up.wire(pb.Cancel))
    run.coordinator.tell(consents=consents)
    run.play().ends_well()
    assert not given_up.heard("reveal")
    assert not given_up.heard("failed")


# ---- the directory of keys ----


def test_keys_of_an_epoch_before_the_newest_that_was_seen_are_refused(run: Run):
    """On an old list is somebody who was revoked since."""
    run.play().ends_well()
    seen = run.signed.directory.epoch
    old = run.play(epoch=seen - 1)
    run.coordinator.publish(epoch=seen - 1)
    run.coordinator.tell(order=old.message)
    run.signed = run.coordinator.publish()
    old.is_refused(RefusalCode.ROSTER_INVALID, f"expected keys of epoch {seen} or later")


def replayed(run: Run, folder: Path) -> None:
    """The old list as if it were the new one."""
    run.coordinator.publish(epoch=run.signed.directory.epoch - 1)


def of_the_epoch_that_was_seen(run: Run, folder: Path) -> None:
    run.coordinator.publish(epoch=run.signed.directory.epoch, ward_1=another_key())


def with_a_key_in_a_friends_place(run: Run, folder: Path) -> None:
    good = run.coordinator.publish()
    changed = run.coordinator.publish(epoch=good.directory.epoch, ward_1=another_key())
    run.coordinator.show(SignedDirectory(changed.directory, good.signature))


def of_another_ca(run: Run, folder: Path) -> None:
    stranger, _ = new_authority(folder, now=datetime.now(UTC).replace(microsecond=0))
    run.coordinator.forge(run.coordinator.publish().directory, signer=stranger)


def of_another_federation(run: Run, folder: Path) -> None:
    directory = run.coordinator.publish().directory
    run.coordinator.forge(replace(directory, federation="0" * 16))


def with_a_site_twice(run: Run, folder: Path) -> None:
    directory = run.coordinator.publish().directory
    twice = replace(directory.statements[0], key=another_key())
    run.coordinator.forge(Directory.of(directory.federation, directory.epoch, (*directory.statements, twice)))


def with_another_key_of_the_agents(run: Run, folder: Path) -> None:
    """Though the CA has signed it."""
    run.coordinator.publish(ward_2=another_key())


def without_the_agent(run: Run, folder: Path) -> None:
    run.coordinator.publish(ward_2=None)


def expired(run: Run, folder: Path) -> None:
    directory = run.coordinator.publish().directory
    lines = [replace(each, not_after=1) for each in directory.statements]
    run.coordinator.forge(Directory.of(directory.federation, directory.epoch, lines))


DIRECTORIES = {
    replayed: "or a later one, found epoch",
    of_the_epoch_that_was_seen: "or a later one, found another",
    with_a_key_in_a_friends_place: "that this federation's CA has signed",
    of_another_ca: "that this federation's CA has signed",
    of_another_federation: "expected one of federation",
    with_a_site_twice: "each of them once",
    with_another_key_of_the_agents: "somebody else signs as this site",
    without_the_agent: "no key of ward-2",
    expired: "no key of ward-2",
}


@pytest.mark.parametrize("show", DIRECTORIES)
def test_a_directory_that_is_not_the_cas_newest_with_this_sites_own_key_is_refused(
    run: Run, tmp_path: Path, show: Callable[[Run, Path], None]
):
    run.play().ends_well()
    asked = run.signed.directory.epoch + 1
    show(run, tmp_path)
    play = run.play(epoch=asked)
    run.coordinator.tell(order=play.message)
    failed = play.hear("failed")
    run.coordinator.epoch = max(run.coordinator.epoch, asked)
    run.signed = run.coordinator.publish()
    play.is_refused(RefusalCode.ROSTER_INVALID, DIRECTORIES[show])
    assert failed.refusal.code == RefusalCode.ROSTER_INVALID
    assert not play.heard("advertise")


def test_an_agent_that_was_started_again_remembers_the_newest_directory(attack: Attacked, run: Run):
    run.play().ends_well()
    seen = run.signed.directory.epoch
    attack.restart()
    run.coordinator.tell(offer=run.offer)
    run.coordinator.hear("accept", run.is_about, after=1)
    old = run.play(epoch=seen - 1)
    run.coordinator.tell(order=old.message)
    old.is_refused(RefusalCode.ROSTER_INVALID, f"expected keys of epoch {seen} or later")


# ---- what is asked for ----


def refused_offer(run: Run) -> pb.Refusal:
    run.coordinator.tell(offer=run.offer)
    refusal: pb.Refusal = run.coordinator.hear("refuse", run.is_about).refusal
    return refusal


def test_an_offer_without_secure_aggregation_is_refused_where_the_owner_requires_it(attack: Attacked):
    plain = Run.offered(attack.coordinator, more="")
    refusal = refused_offer(plain)
    assert refusal.code == RefusalCode.PROTECTION_TOO_WEAK
    assert "[policy] requires it" in refusal.message


@pytest.mark.parametrize(
    "changes",
    [
        {"least": 2},
        {"least": 1},
        {"clients": 2},
        {"bits": 4},
        {"bits": 64},
        {"bound": math.inf},
        {"suite": 9},
    ],
    ids=["sums of two", "of one", "among two", "few bits", "many bits", "no bound", "unknown suite"],
)
def test_an_offer_of_sums_that_protect_nobody_or_cannot_be_is_refused(
    attack: Attacked, changes: dict[str, Any]
):
    run = Run.offered(attack.coordinator)
    for key, value in changes.items():
        setattr(run.offer.secure_aggregation, key, value)
    refused_offer(run)
    assert not run.coordinator.heard("accept", run.is_about)


def test_an_offer_whose_sums_only_an_honest_coordinator_does_not_break_is_refused(attack: Attacked):
    run = Run.offered(attack.coordinator, more=SECURE + "consistency = false\n")
    refusal = refused_offer(run)
    assert refusal.code == RefusalCode.PROTECTION_TOO_WEAK
    assert "honest_coordinator" in refusal.message


def test_an_order_without_its_secure_sum_is_refused(run: Run):
    play = run.play()
    play.message.ClearField("secure")
    run.coordinator.tell(order=play.message)
    play.is_refused(RefusalCode.TASK_FAILED)
    assert not play.heard("advertise")


def test_a_model_that_is_not_finite_makes_no_masked_vector(run: Run):
    """Masked, nobody would see that it is not finite: the sum would be void."""
    play = run.play(scale=float("nan"))
    run.coordinator.tell(envelopes=play.roster())
    play.is_refused(RefusalCode.NOT_FINITE)


def test_an_order_of_work_that_was_not_offered_is_refused(run: Run):
    play = run.play()
    play.message.id.kind = pb.KIND_GRADIENT
    run.coordinator.tell(order=play.message)
    failed = play.hear("failed")
    assert failed.refusal.code == RefusalCode.TASK_FAILED
    run.play().ends_well()
    assert not play.heard("update")


# ---- too much ----


def too_many_members(play: Play) -> dict[str, Any]:
    members = [pb.Member(site=f"ward-{n}") for n in range(257)]
    return {"roster": play.wire(pb.Roster, members=members)}


def a_name_that_is_none(play: Play) -> dict[str, Any]:
    return {"roster": play.wire(pb.Roster, members=[pb.Member(site="../ward-1")])}


def too_many_envelopes(play: Play) -> dict[str, Any]:
    envelopes = [pb.Envelope(number=n, sealed=b"x") for n in range(257)]
    return {"envelopes": play.wire(pb.Envelopes, envelopes=envelopes)}


def two_envelopes_of_one(play: Play) -> dict[str, Any]:
    return {"envelopes": play.wire(pb.Envelopes, envelopes=[pb.Envelope(number=1)] * 2)}


def too_many_consents(play: Play) -> dict[str, Any]:
    return {"consents": play.wire(pb.Consents, numbers=range(257), signatures=[b"x"] * 257)}


def consents_without_numbers(play: Play) -> dict[str, Any]:
    return {"consents": play.wire(pb.Consents, numbers=[1], signatures=[b"x"] * 2)}


@pytest.mark.parametrize(
    "made",
    [
        too_many_members,
        a_name_that_is_none,
        too_many_envelopes,
        two_envelopes_of_one,
        too_many_consents,
        consents_without_numbers,
    ],
)
def test_a_message_that_is_too_large_or_malformed_costs_its_sum_alone(
    run: Run, made: Callable[[Play], dict[str, Any]]
):
    play = run.play()
    play.order()
    run.coordinator.tell(**made(play))
    play.is_refused(RefusalCode.TASK_FAILED, "see the site's log")


def flood(run: Run, play: Play) -> None:
    """More messages in one go than an agent holds."""
    each = pb.ServerMessage(survivors=play.wire(pb.Survivors, members=b"x"))
    run.coordinator.tell_all([each] * (3 * MAX_WAITING))


def a_large_message(run: Run, play: Play) -> None:
    run.coordinator.tell(survivors=play.wire(pb.Survivors, members=bytes(MAX_MESSAGE_BYTES + 1)))


def an_unknown_message(run: Run, play: Play) -> None:
    run.coordinator.tell_all([pb.ServerMessage()])


@pytest.mark.parametrize("overwhelm", [flood, a_large_message, an_unknown_message])
def test_what_no_session_may_carry_ends_the_session_and_the_agent_comes_again(
    run: Run, overwhelm: Callable[[Run, Play], None]
):
    sessions, play = run.coordinator.sessions, run.play()
    play.order()
    overwhelm(run, play)
    run.coordinator.reconnected(sessions)
    run.coordinator.tell(offer=run.offer)
    run.coordinator.hear("accept", run.is_about, after=1)
    run.play().ends_well()
    assert not play.heard("reveal")
    assert not play.heard("update")
