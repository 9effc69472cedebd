"""What a coordinator can make a site pay for, where members of secure sums add the noise: what was masked, no more.

It can: each masked update may be in a sum that it keeps to itself. The agent is real, and so is its ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from harness import until
from malicious import Attacked, Play, Run, attacked

from fedge.refusal import RefusalCode
from fedge.wire import fedge_pb2 as pb

STEPS = 2
"""Of an epoch of the site's eight rows."""

PRIVATE = """
[secure_aggregation]
enabled = true
[privacy]
unit = "client"
delta = 1e-5
clip = 0.5
noise_multiplier = 40.0
"""
PRIVATE_EXAMPLES = """
[secure_aggregation]
enabled = true
[privacy]
unit = "example"
delta = 1e-5
clip = 1.0
noise_multiplier = 20.0
[evaluation]
every = 0
"""


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    folder = tmp_path_factory.mktemp("attacked")
    with attacked(folder, units=["client", "example"], max_epsilon=50.0) as started:
        yield started


def paid(attack: Attacked, run: Run) -> int:
    """How many releases of a run were paid for."""
    lines = [
        line for each in attack.ledger["runs"] if each["name"] == run.run_id for line in each["releases"]
    ]
    return sum(int(line.split(" x ")[0]) for line in lines)


def begin(attack: Attacked, play: Play) -> pb.Roster:
    """Order it, and wait until the agent has trained: then it waits for the others' shares."""
    roster = play.order()
    attack.agent.says(f"update_waits run={play.run.run_id}")
    return roster


def was_trained_for(attack: Attacked, play: Play) -> bool:
    """Whether the agent trains for an order that it hands in for."""
    script = attack.control / "script"
    script.write_text("\n" * STEPS)
    play.envelopes()
    trained = not script.read_text()
    script.unlink()
    return trained


def no_price(attack: Attacked, run: Run) -> None:
    """Wait until nothing is set aside any more; nothing was paid for."""
    until(lambda: attack.ledger["outstanding"] == 0, "what was set aside is given back")
    assert not paid(attack, run)


def called_off(play: Play, roster: pb.Roster) -> None:
    play.run.coordinator.tell(cancel=play.wire(pb.Cancel))


def with_a_roster_that_is_refused(play: Play, roster: pb.Roster) -> None:
    play.run.coordinator.tell(roster=play.wire(pb.Roster, members=roster.members[:2]))
    assert play.hear("failed").refusal.code == RefusalCode.ROSTER_INVALID


@pytest.mark.parametrize("end", [called_off, with_a_roster_that_is_refused])
def test_an_attempt_that_ends_before_anything_was_masked_costs_nothing_and_its_work_is_kept(
    attack: Attacked, end: Callable[[Play, pb.Roster], None]
):
    run = Run.begun(attack.coordinator, more=PRIVATE)
    first = run.play()
    end(first, begin(attack, first))
    no_price(attack, run)
    assert not was_trained_for(attack, run.play(round=1, attempt=2))
    run.end()
    assert paid(attack, run) == 1
    assert not first.heard("update")


def test_each_masked_update_is_paid_for_and_has_noise_of_its_own(attack: Attacked):
    run = Run.begun(attack.coordinator, more=PRIVATE)
    for attempt in (1, 2, 3):
        assert was_trained_for(attack, run.play(round=1, attempt=attempt))
    run.end()
    assert paid(attack, run) == 3


def test_an_attempt_that_was_answered_before_is_answered_with_the_same_bytes_for_nothing(attack: Attacked):
    run = Run.begun(attack.coordinator, more=PRIVATE)
    play = run.play()
    play.envelopes()
    Run.begun(attack.coordinator, more=PRIVATE).end()  # behind which the first answer is done with
    run.coordinator.tell(order=play.message)
    again = play.hear("update", after=1)
    run.end()
    assert again == play.hear("update")
    assert paid(attack, run) == 1


def test_where_examples_are_protected_all_attempts_at_a_round_mask_one_update_that_is_paid_for_once(
    attack: Attacked,
):
    """The noise is in it from the start: to see it in two sums tells no more than one."""
    run = Run.begun(attack.coordinator, more=PRIVATE_EXAMPLES)
    never_masked = run.play()
    called_off(never_masked, never_masked.order())
    no_price(attack, run)
    for attempt in (2, 3):
        run.play(round=1, attempt=attempt).envelopes()
    steps = paid(attack, run)
    run.play(round=2).envelopes()
    run.end()
    assert paid(attack, run) == 2 * steps > 0


def test_an_order_with_a_clip_of_its_own_is_refused_where_the_noise_was_made_for_the_offered_one(
    attack: Attacked,
):
    run = Run.begun(attack.coordinator, more=PRIVATE)
    play = run.play()
    play.message.clip = 0.25
    run.coordinator.tell(order=play.message)
    failed = play.hear("failed")
    run.end()
    assert (failed.refusal.code, failed.refusal.message) == (RefusalCode.TASK_FAILED, "see the site's log")
    attack.agent.says("expected the clip that the noise in sums was made for")
    assert not play.heard("update")
