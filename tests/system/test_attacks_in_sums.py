"""A coordinator that lies in a secure sum, and a real agent over real TLS: a typed refusal, and nothing is revealed.

What the agent is defended with is tested check by check in tests/core/test_secagg_attacks.py; here it is that the
checks are made, in the process that an engineer runs, on what comes over the wire.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from malicious import EVERYBODY, OTHERS, SITE, Attacked, Play, Run

from fedge.errors import RunError
from fedge.events import OrderId
from fedge.refusal import RefusalCode
from fedge.secagg import shamir
from fedge.secagg.canonical import bitmap
from fedge.secagg.keys import Suite
from fedge.secagg.session import Advertisement, commitment_of
from fedge.secagg.site import apply_all, self_mask_key
from fedge.wire import fedge_pb2 as pb
from fedge.wire import secure as codec

FRIEND, OTHER_FRIEND, THIRD_FRIEND = OTHERS


@pytest.fixture
def play(attack: Attacked) -> Iterator[Play]:
    """An order of a run of its own."""
    run = Run.begun(attack.coordinator)
    yield run.play()
    run.end()


def number(site: str) -> int:
    return EVERYBODY.index(site) + 1


def of_those(*sites: str) -> bytes:
    return bitmap([site in sites for site in EVERYBODY])


def signed(play: Play, key: Advertisement, *, by: str = "", **changes: Any) -> pb.Member:
    """An advertisement with changes that its site, or another one, has signed."""
    changed = dataclasses.replace(key, **changes)
    signer = play.run.coordinator.identities[by or key.site].signing
    return codec.encode_member(dataclasses.replace(changed, signature=signer.sign(changed.signed())))


# ---- by the rules ----


@pytest.mark.parametrize("without", ["", *OTHERS])
def test_who_keeps_to_the_rules_gets_the_mean_and_nothing_else(play: Play, without: str):
    play.ends_well(without=without)
    (update,) = play.heard("update")
    assert (update.num_examples, list(update.metrics)) == (1, [])
    encoding = play.run.terms.encoding(len(play.model), play.context.digest)
    with pytest.raises(RunError):  # alone it is the sum of nobody
        encoding.decode(encoding.unpack(update.vector.inline), 1)


def test_what_is_asked_again_is_answered_with_the_same_bytes(play: Play):
    """So there is nothing that a coordinator could take the difference of."""
    tell = play.run.coordinator.tell
    roster = play.order()
    tell(order=play.message)
    envelopes = play.roster(roster)
    tell(roster=roster)
    survivors = play.envelopes(envelopes)
    tell(envelopes=envelopes)
    tell(order=play.message)
    consents = play.survivors(survivors)
    tell(survivors=survivors)
    play.consents(consents)
    tell(consents=consents)
    for kind, times in {"advertise": 3, "share": 2, "update": 2, "consent": 2, "reveal": 2}.items():
        play.hear(kind, after=times - 1)
        assert len({each.SerializeToString() for each in play.heard(kind)}) == 1, kind


# ---- keys ----


def substituted(part: str) -> Callable[[Play, dict[str, pb.Member]], None]:
    def forge(play: Play, members: dict[str, pb.Member]) -> None:
        setattr(members[FRIEND], part, getattr(play.part(FRIEND).advertisement, part))

    return forge


def signed_by_another(play: Play, members: dict[str, pb.Member]) -> None:
    members[FRIEND] = signed(play, play.part(FRIEND).advertisement, by=OTHER_FRIEND)


def of_its_own(play: Play, members: dict[str, pb.Member]) -> None:
    """The agent's own keys, exchanged for some that the coordinator knows."""
    key = play.part(SITE).advertisement  # the best that it can hope for: the agent's own signature
    members[SITE] = codec.encode_member(key)


def without_the_agent(play: Play, members: dict[str, pb.Member]) -> None:
    del members[SITE]


def cut_to_two(play: Play, members: dict[str, pb.Member]) -> None:
    del members[FRIEND], members[OTHER_FRIEND]


def low_order(key: bytes, part: str) -> Callable[[Play, dict[str, pb.Member]], None]:
    def forge(play: Play, members: dict[str, pb.Member]) -> None:
        members[FRIEND] = signed(play, play.parts[FRIEND].advertisement, **{part: key})

    return forge


def one_key_for_two(play: Play, members: dict[str, pb.Member]) -> None:
    """A friend that passes another one's key off as its own."""
    other = play.parts[OTHER_FRIEND].advertisement
    members[FRIEND] = signed(play, play.parts[FRIEND].advertisement, mask=other.mask)


def the_agents_key_for_a_friend(play: Play, members: dict[str, pb.Member]) -> None:
    """With it masks would cancel."""
    assert play.keys is not None
    members[FRIEND] = signed(play, play.parts[FRIEND].advertisement, mask=play.keys.mask)


ROSTERS = {
    "the key of a channel was exchanged": (substituted("channel"), "has not signed"),
    "the key of a mask was exchanged": (substituted("mask"), "has not signed"),
    "a commitment was exchanged": (substituted("commitment"), "has not signed"),
    "another member has signed": (signed_by_another, "has not signed"),
    "the agent's own keys were exchanged": (of_its_own, "as this site has sent it"),
    "the agent is not in it": (without_the_agent, "as this site has sent it"),
    "only two are in it": (cut_to_two, "2 members, where 3 to 4 may be"),
    "a channel's key is of low order": (low_order(bytes(32), "channel"), "the key of ward-1"),
    "a mask's key is of low order": (low_order(b"\1" + bytes(31), "mask"), "the key of ward-1"),
    "a key is cut off": (low_order(b"\7" * 31, "mask"), "the key of ward-1"),
    "two have one key": (one_key_for_two, "a key that two have"),
    "a friend has the agent's key": (the_agents_key_for_a_friend, "a key that two have"),
}


@pytest.mark.parametrize("what", ROSTERS)
def test_a_roster_that_is_not_of_the_members_keys_is_refused(play: Play, what: str):
    forge, found = ROSTERS[what]
    members = {member.site: member for member in play.order().members}
    forge(play, members)
    roster = play.wire(pb.Roster, members=[members[site] for site in sorted(members)])
    play.run.coordinator.tell(roster=roster)
    play.is_refused(RefusalCode.ROSTER_INVALID, found)
    assert not play.heard("share")


def test_a_member_that_is_there_twice_is_refused(play: Play):
    members = {member.site: member for member in play.order().members}
    twice = [members[FRIEND], members[FRIEND], members[SITE]]
    play.run.coordinator.tell(roster=play.wire(pb.Roster, members=twice))
    play.is_refused(RefusalCode.ROSTER_INVALID, "there twice")


def test_a_stranger_in_the_place_of_a_member_is_refused(play: Play):
    members = {member.site: member for member in play.order().members}
    members["ward-5"] = signed(play, play.part(FRIEND).advertisement, site="ward-5", by=FRIEND)
    del members[FRIEND]
    roster = play.wire(pb.Roster, members=[members[site] for site in sorted(members)])
    play.run.coordinator.tell(roster=roster)
    play.is_refused(RefusalCode.ROSTER_INVALID, "ward-5, which is not in the signed directory")


def test_another_roster_after_the_first_is_refused(play: Play):
    """One without a friend, say, so as to have shares for two cohorts."""
    roster = play.order()
    play.roster(roster)
    fewer = [member for member in roster.members if member.site != FRIEND]
    play.run.coordinator.tell(roster=play.wire(pb.Roster, members=fewer))
    failed = play.hear("failed")
    assert (failed.refusal.code, len(play.heard("share"))) == (RefusalCode.ROSTER_INVALID, 1)
    play.is_refused(RefusalCode.ROSTER_INVALID, "a roster once")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": b"n" * 32},
        {"vectors": b"w" * 32},
        {"offer": b"f" * 32},
        {"least": 4},
        {"suite": Suite.X25519_MLKEM768},
        {"order": OrderId("train", 1, 2)},
        {"run_id": "another"},
        {"consistency": False},
    ],
    ids=["model", "encoding", "offer", "least", "suite", "attempt", "run", "consistency"],
)
def test_a_friend_that_was_asked_for_something_else_is_refused(play: Play, changes: dict[str, Any]):
    """Another model for each client would make each one's part of the sum stand out."""
    members = {member.site: member for member in play.order().members}
    rules = dataclasses.replace(play.context, **changes)
    key = dataclasses.replace(play.parts[FRIEND].advertisement, context=rules.digest)
    members[FRIEND] = signed(play, key)
    roster = play.wire(pb.Roster, members=[members[site] for site in EVERYBODY])
    play.run.coordinator.tell(roster=roster)
    play.is_refused(RefusalCode.CONTEXT_DIFFERS, f"{FRIEND} was asked for something else")


def test_a_friends_keys_of_an_earlier_sum_are_refused(play: Play):
    play.ends_well()
    earlier = codec.encode_member(play.parts[FRIEND].advertisement)
    replayed = play.run.play()
    members = {member.site: member for member in replayed.order().members}
    members[FRIEND] = earlier
    roster = replayed.wire(pb.Roster, members=[members[site] for site in EVERYBODY])
    replayed.run.coordinator.tell(roster=roster)
    replayed.is_refused(RefusalCode.CONTEXT_DIFFERS)


# ---- shares ----


def bent(envelopes: pb.Envelopes, at: int) -> pb.Envelopes:
    changed = pb.Envelopes()
    changed.CopyFrom(envelopes)
    sealed = bytearray(changed.envelopes[at].sealed)
    sealed[7] ^= 1
    changed.envelopes[at].sealed = bytes(sealed)
    return changed


def test_corrupt_shares_are_blamed_on_their_sender(play: Play):
    envelopes = bent(play.roster(), 1)
    play.run.coordinator.tell(envelopes=envelopes)
    play.is_refused(RefusalCode.SHARES_INVALID, "cannot be opened", blamed=(OTHER_FRIEND,))


def test_shares_under_another_members_name_are_blamed_on_it(play: Play):
    envelopes = play.roster()
    one, two, _ = envelopes.envelopes
    one.number, two.number = two.number, one.number
    play.run.coordinator.tell(envelopes=envelopes)
    play.is_refused(RefusalCode.SHARES_INVALID, blamed=(OTHER_FRIEND, FRIEND))


def test_shares_of_one_friend_alone_are_refused(play: Play):
    """With one other, of whom the coordinator knows the mask, the agent would stand alone."""
    envelopes = play.roster()
    del envelopes.envelopes[1:]
    play.run.coordinator.tell(envelopes=envelopes)
    play.is_refused(RefusalCode.ROSTER_INVALID, "shares of 2 members, where 3 are needed")


def test_other_shares_after_the_first_are_refused(play: Play):
    """Without a friend's: there would be no mask between them the second time."""
    envelopes = play.roster()
    play.envelopes(envelopes)
    del envelopes.envelopes[2:]
    play.run.coordinator.tell(envelopes=envelopes)
    play.is_refused(RefusalCode.ROSTER_INVALID, "envelopes once", handed_in=True)


# ---- survivors ----


@pytest.mark.parametrize(
    ("members", "found"),
    [
        (of_those(SITE, FRIEND), "2 members, where 3 are needed"),
        (of_those(SITE), "1 members, where 3 are needed"),
        (of_those(*OTHERS), "all but this site, whose input was handed in"),
        (bytes(1), "all but this site"),
        (b"", ""),
        (b"\xff", ""),
        (bytes(1000), ""),
    ],
    ids=["two", "the agent alone", "all but the agent", "nobody", "no bits", "a fifth", "too many bits"],
)
def test_survivors_that_cannot_be_are_refused(play: Play, members: bytes, found: str):
    play.envelopes()
    play.run.coordinator.tell(survivors=play.wire(pb.Survivors, members=members))
    play.is_refused(RefusalCode.SURVIVORS_INVALID, found, handed_in=True)
    assert not play.heard("consent")


def test_a_friend_that_is_both_dead_and_alive_opens_nothing(play: Play):
    """Overlapping lists: both shares of one member would take its mask off for good."""
    consents = play.survivors()
    play.run.coordinator.tell(survivors=play.wire(pb.Survivors, members=of_those(SITE, FRIEND, THIRD_FRIEND)))
    play.run.coordinator.tell(consents=consents)  # of the first list
    play.is_refused(RefusalCode.SURVIVORS_INVALID, "survivors once", handed_in=True)
    assert len(play.heard("consent")) == 1


def test_two_lists_of_survivors_for_two_members_open_nothing(play: Play):
    """A friend that consents to another list, as it was shown, is no consent to the agent's."""
    play.envelopes()
    play.run.coordinator.tell(survivors=play.wire(pb.Survivors, members=of_those(*EVERYBODY)))
    own = play.hear("consent").signature
    elsewhere = of_those(SITE, FRIEND, OTHER_FRIEND)
    given = {number(SITE): own, number(THIRD_FRIEND): play.parts[THIRD_FRIEND].consent(of_those(*EVERYBODY))}
    given |= {number(site): play.parts[site].consent(elsewhere) for site in (FRIEND, OTHER_FRIEND)}
    consents = codec.encode_consents(play.run.run_id, play.message.id, given)
    play.run.coordinator.tell(consents=consents)
    play.is_refused(RefusalCode.CONSENTS_INVALID, "found 2 of 4", handed_in=True)


def test_who_is_declared_dead_while_it_trains_hands_in_nothing_afterwards(attack: Attacked, play: Play):
    """Its mask's seed may be out by then, and a late input would be in clear."""
    with attack.blocked():
        play.run.coordinator.tell(envelopes=play.roster())
        attack.at_work()
        play.run.coordinator.tell(survivors=play.wire(pb.Survivors, members=of_those(*OTHERS)))
        play.hear("failed")
    play.is_refused(RefusalCode.SURVIVORS_INVALID)


# ---- consents ----


def alone(play: Play, given: dict[int, bytes]) -> dict[int, bytes]:
    return {number(SITE): given[number(SITE)]}


def under_all_names(play: Play, given: dict[int, bytes]) -> dict[int, bytes]:
    return dict.fromkeys(given, given[number(FRIEND)])


def made_up(play: Play, given: dict[int, bytes]) -> dict[int, bytes]:
    return {each: secrets.token_bytes(64) for each in given}


def of_strangers(play: Play, given: dict[int, bytes]) -> dict[int, bytes]:
    return {each + 100: signature for each, signature in given.items()}


def none(play: Play, given: dict[int, bytes]) -> dict[int, bytes]:
    return {}


@pytest.mark.parametrize("forge", [alone, under_all_names, made_up, of_strangers, none])
def test_consents_that_members_have_not_given_are_refused(
    play: Play, forge: Callable[[Play, dict[int, bytes]], dict[int, bytes]]
):
    given = codec.decode_consents(play.survivors())
    consents = codec.encode_consents(play.run.run_id, play.message.id, forge(play, given))
    play.run.coordinator.tell(consents=consents)
    play.is_refused(RefusalCode.CONSENTS_INVALID, "expected 3 members' consents", handed_in=True)


def test_consents_of_an_earlier_round_are_refused(play: Play):
    earlier = play.survivors()
    play.consents(earlier)
    replayed = play.run.play()
    replayed.survivors()
    consents = replayed.wire(pb.Consents, numbers=earlier.numbers, signatures=earlier.signatures)
    replayed.run.coordinator.tell(consents=consents)
    replayed.is_refused(RefusalCode.CONSENTS_INVALID, "found 0 of 4", handed_in=True)


# ---- out of turn ----


@pytest.mark.parametrize("kind", ["envelopes", "survivors", "consents"])
def test_messages_before_their_turn_are_refused(play: Play, kind: str):
    play.order()
    message: dict[str, Any] = {
        "envelopes": play.wire(pb.Envelopes, envelopes=[pb.Envelope(number=1, sealed=b"x")]),
        "survivors": play.wire(pb.Survivors, members=of_those(*EVERYBODY)),
        "consents": play.wire(pb.Consents, numbers=[1], signatures=[b"x" * 64]),
    }
    code = {
        "envelopes": RefusalCode.ROSTER_INVALID,
        "survivors": RefusalCode.SURVIVORS_INVALID,
        "consents": RefusalCode.CONSENTS_INVALID,
    }
    play.run.coordinator.tell(**{kind: message[kind]})
    play.is_refused(code[kind], "in its turn")


# ---- masks ----


def test_the_difference_of_two_attempts_says_nothing(play: Play):
    """An attempt that is given up, and another of the same round: other keys, other masks, of the same update."""
    play.envelopes()
    (first,) = play.heard("update")
    retry = play.run.play(round=play.message.id.round, attempt=2)
    retry.ends_well()
    (second,) = retry.heard("update")
    encoding = play.run.terms.encoding(len(play.model), b"")
    one, two = (encoding.unpack(each.vector.inline) for each in (first, second))
    for words, others in zip(one, two, strict=True):
        apart = np.abs((words - others).astype(np.int64 if words.itemsize == 8 else np.int32))
        assert apart.min() > 1  # an update's elements are rounded: they would differ by one at most
    assert not play.heard("reveal")


def test_all_masks_with_friends_taken_off_the_agents_own_is_left(play: Play):
    """What the coordinator has if every other member is its friend: it lacks the shares of one more than those."""
    play.envelopes()
    (update,) = play.heard("update")
    encoding = play.run.terms.encoding(len(play.model), play.context.digest)
    words = [each.copy() for each in encoding.unpack(update.vector.inline)]
    masks = {site: play.opened[site]._masks[number(SITE)] for site in OTHERS}
    above = [mask for site, mask in masks.items() if site > SITE]
    below = [mask for site, mask in masks.items() if site < SITE]
    apply_all(words, add=below, subtract=above)
    with pytest.raises(RunError):
        encoding.decode(words, 1)
    assert play.keys is not None
    commitment = play.keys.commitment

    def rebuilt(*sites: str) -> bytes | None:
        held = np.stack([play.opened[site]._held[number(SITE)] for site in sites])
        return shamir.rebuild([number(site) for site in sites], held)[1]

    assert commitment_of(rebuilt(FRIEND, OTHER_FRIEND) or b"") != commitment
    # Three of four are not what anybody is protected against, and show that nothing else was in the way.
    seed = rebuilt(*OTHERS) or b""
    assert commitment_of(seed) == commitment
    apply_all(words, subtract=[self_mask_key(seed, play.opened[FRIEND].sid)])
    alone = encoding.decode(words, 1)
    learned = play.released(SITE)
    assert alone.summary.weight == learned.num_examples
    assert np.allclose(alone.vector / alone.summary.weight, learned.vector, atol=1e-5)
