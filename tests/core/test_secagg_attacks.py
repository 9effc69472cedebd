"""A coordinator that lies, and members that do: each attempt ends in a typed refusal, and nothing is revealed.

Each test is one attack on a site that does as the protocol says. Where a check is taken out of `fedge.secagg.site`
or `fedge.secagg.server`, one of these fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from secagg_sessions import (
    Play,
    context,
    directory_of,
    finish,
    name,
    plain_sum,
    same,
    signer,
    vectors_for,
)

from fedge.errors import BlamedError, RefusedError
from fedge.events import OrderId
from fedge.refusal import RefusalCode
from fedge.secagg import server, site
from fedge.secagg.keys import KeyPair, Suite
from fedge.secagg.session import Advertisement, Roster, consent_signed
from fedge.secagg.shamir import PRIME
from fedge.secagg.shards import shard_of, shards_for
from fedge.secagg.site import Rules

LOW_ORDER = bytes.fromhex(
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"
)  # RFC 7748's curve


def refused(code: RefusalCode, act: Callable[[], object], match: str | None = None) -> RefusedError:
    with pytest.raises(RefusedError, match=match) as caught:
        act()
    assert caught.value.refusal.code == code
    return caught.value


def sign_again(advertisement: Advertisement, number: int, **changes: object) -> Advertisement:
    """What member `number` might itself have said."""
    changed = replace(advertisement, **changes)  # type: ignore[arg-type]
    return replace(changed, signature=signer(number).sign(changed.signed()))


@pytest.fixture
def play() -> Play:
    return Play(5)


@pytest.fixture
def adverts(play: Play) -> dict[int, Advertisement]:
    return play.advertise()


def share_of_one(play: Play, roster: Roster, directory=None) -> object:
    return play.sites[1].share(roster, directory or play.directory, play.entropy[1])


# P0: what a site agrees to begin.


def test_a_session_for_fewer_than_the_owner_wants_is_not_begun():
    refused(
        RefusalCode.PROTECTION_TOO_WEAK,
        lambda: Play(5, context(least=4), rules=Rules(least=5)).advertise(),
        "sums of 4 sites or more; this site wants 5",
    )


@pytest.mark.parametrize("least", [0, 1, 2])
def test_a_sum_of_two_is_not_begun_whatever_the_owner_says(least: int):
    refused(
        RefusalCode.PROTECTION_TOO_WEAK,
        lambda: Play(5, context(least=least), rules=Rules(least=0)).advertise(),
    )


def test_a_session_without_the_consistency_check_needs_the_owners_consent():
    refused(
        RefusalCode.PROTECTION_TOO_WEAK,
        lambda: Play(5, context(consistency=False)).advertise(),
        "honest_coordinator",
    )


# P1: the roster.


def test_a_roster_of_fewer_than_was_said_is_refused(play, adverts):
    refused(
        RefusalCode.ROSTER_INVALID,
        lambda: share_of_one(play, Roster.of([adverts[1], adverts[2]])),
        "2 members",
    )


def test_a_truncated_roster_without_this_site_is_refused(play, adverts):
    roster = Roster.of(adverts[n] for n in (2, 3, 4, 5))
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, roster), "as this site has sent it")


def test_a_roster_of_more_than_a_session_holds_is_refused(play, adverts):
    many = [replace(adverts[2], site=f"x{n}") for n in range(300)]
    refused(
        RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, Roster.of([adverts[1], *many])), "301 members"
    )


def test_a_roster_of_more_than_the_noise_and_the_ring_were_made_for_is_refused():
    play = Play(5, context(most=4))
    roster = Roster.of(play.advertise().values())
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, roster), "5 members, where 3 to 4 may be")


@pytest.mark.parametrize("part", ["channel", "mask", "commitment"])
def test_substituted_keys_are_refused(play, adverts, part):
    other = KeyPair.of(b"z" * 32, Suite.X25519, "mask").public
    adverts[3] = replace(adverts[3], **{part: other})
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, Roster.of(adverts.values())), "not signed")


def test_keys_signed_by_somebody_else_are_refused(play, adverts):
    adverts[3] = sign_again(adverts[3], 4)
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, Roster.of(adverts.values())), "not signed")


def test_this_sites_own_keys_cannot_be_replaced(play, adverts):
    adverts[1] = sign_again(adverts[1], 1, mask=KeyPair.of(b"z" * 32, Suite.X25519, "mask").public)
    refused(
        RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, Roster.of(adverts.values())), "as this site"
    )


def test_a_site_that_the_ca_does_not_know_is_refused(play, adverts):
    unknown = Advertisement("zzz", adverts[1].context, b"c" * 32, b"m" * 32, b"k" * 32)
    roster = Roster.of([*adverts.values(), sign_again(unknown, 99)])
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, roster), "not in the signed directory")


def test_a_directory_of_another_epoch_is_refused(play, adverts):
    refused(
        RefusalCode.ROSTER_INVALID,
        lambda: share_of_one(play, Roster.of(adverts.values()), directory_of(5, epoch=2)),
        "epoch",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model": b"n" * 32},
        {"order": OrderId("train", 4)},
        {"order": OrderId("train", 3, 2)},
        {"vectors": b"w" * 32},
        {"privacy": b"q" * 32},
        {"offer": b"x" * 32},
        {"run_id": "run-2"},
        {"threshold_ppm": 1_000_000},
        {"least": 4},
        {"federation": "f" * 16},
    ],
)
def test_a_member_that_was_asked_for_something_else_is_refused(play, adverts, changes):
    """A model for each client, or terms for each, would let their answers be told apart (Pasquini et al. 2022)."""
    adverts[3] = sign_again(adverts[3], 3, context=context(**changes).digest)
    refused(
        RefusalCode.CONTEXT_DIFFERS, lambda: share_of_one(play, Roster.of(adverts.values())), "another model"
    )


def test_a_replayed_advertisement_of_an_earlier_session_is_refused(play, adverts):
    earlier = Play(5, context(order=OrderId("train", 2))).advertise()
    adverts[3] = earlier[3]
    refused(RefusalCode.CONTEXT_DIFFERS, lambda: share_of_one(play, Roster.of(adverts.values())))


def test_a_name_that_is_there_twice_is_refused(play, adverts):
    second = sign_again(adverts[3], 3, channel=b"c" * 32, mask=b"m" * 32, commitment=b"k" * 32)
    roster = Roster(tuple(sorted([*adverts.values(), second], key=lambda each: each.site)))
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, roster), "twice")


def test_a_roster_out_of_order_is_refused(play, adverts):
    roster = Roster(tuple(adverts[n] for n in (2, 1, 3, 4, 5)))
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, roster), "order")


@pytest.mark.parametrize("part", ["channel", "mask", "commitment"])
def test_a_key_that_two_members_have_is_refused(play, adverts, part):
    adverts[3] = sign_again(adverts[3], 3, **{part: getattr(adverts[2], part)})
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, Roster.of(adverts.values())), "two have")


@pytest.mark.parametrize("part", ["channel", "mask"])
@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), LOW_ORDER, b"short", b"k" * 33])
def test_keys_of_low_order_or_another_size_are_refused(play, adverts, part, key):
    adverts[3] = sign_again(adverts[3], 3, **{part: key})
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, Roster.of(adverts.values())))


def test_a_kem_key_that_is_none_is_refused():
    play = Play(3, context(suite=Suite.X25519_MLKEM768))
    adverts = play.advertise()
    adverts[3] = sign_again(adverts[3], 3, channel=adverts[3].channel[:32] + b"\xff" * 1184)
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, Roster.of(adverts.values())), "ML-KEM")


def test_a_friend_from_another_shard_is_refused():
    """Else a coordinator would put one honest site among its own."""
    terms = context(shards=3)
    places = {n: shard_of(replace(terms, shards=3), name(n)) for n in range(1, 13)}
    mine = [n for n in places if places[n] == places[1]]
    friend = next(n for n in places if places[n] != places[1])
    play = Play(12, replace(terms, shard=places[1]))
    adverts = play.advertise()
    roster = Roster.of(adverts[n] for n in [*mine, friend])
    refused(RefusalCode.ROSTER_INVALID, lambda: share_of_one(play, roster), "another shard")
    share_of_one(play, Roster.of(adverts[n] for n in mine))


@pytest.mark.parametrize("sites", [1, 256, 257, 1000, 20_000])
def test_shards_hold_everybody_and_none_is_too_large(sites: int):
    count = shards_for(sites)
    terms = context(shards=count)
    sizes = np.bincount([shard_of(terms, name(n)) for n in range(sites)], minlength=count)
    assert sizes.sum() == sites
    assert sizes.max() <= 256
    assert count == 1 or sizes.min() >= 100


# P1 to P2: the envelopes.


def shared(play: Play) -> server.Collecting:
    return play.share(play.gather(play.advertise()))


def test_an_envelope_that_was_changed_is_blamed_on_its_sender(play):
    envelopes = shared(play).envelopes(1)
    sealed = bytearray(envelopes[3].sealed)
    sealed[5] ^= 1
    envelopes[3] = replace(envelopes[3], sealed=bytes(sealed))
    error = refused(RefusalCode.SHARES_INVALID, lambda: play.sites[1].open(envelopes), name(3))
    assert isinstance(error, BlamedError)
    assert error.culprits == (name(3),)


def test_envelopes_for_somebody_else_or_the_other_way_round_do_not_open(play):
    collecting = shared(play)
    mine = collecting.envelopes(1)
    for wrong in (collecting.envelopes(2)[3], collecting.shares[1].envelopes[3]):
        refused(RefusalCode.SHARES_INVALID, lambda wrong=wrong: play.sites[1].open(mine | {3: wrong}))


def test_envelopes_of_an_earlier_session_do_not_open(play):
    earlier = shared(Play(5, context(order=OrderId("train", 2)))).envelopes(1)
    mine = shared(play).envelopes(1)
    refused(RefusalCode.SHARES_INVALID, lambda: play.sites[1].open(mine | {3: earlier[3]}))


@pytest.mark.parametrize("part", ["channel", "mask"])
def test_a_ciphertext_that_was_exchanged_is_noticed(part):
    play = Play(3, context(suite=Suite.X25519_MLKEM768))
    envelopes = shared(play).envelopes(3)
    other = getattr(envelopes[2], part)
    refused(
        RefusalCode.SHARES_INVALID,
        lambda: play.sites[3].open(envelopes | {1: replace(envelopes[1], **{part: other})}),
    )
    refused(
        RefusalCode.SHARES_INVALID,
        lambda: play.sites[3].open(envelopes | {1: replace(envelopes[1], **{part: b"short"})}),
    )


def test_envelopes_of_too_few_are_refused(play):
    envelopes = shared(play).envelopes(1)
    few = {n: envelopes[n] for n in (2, 3)}
    refused(RefusalCode.ROSTER_INVALID, lambda: play.sites[1].open(few), "3 members, where 4 are needed")


@pytest.mark.parametrize("number", [0, 1, 6])
def test_envelopes_of_nobody_are_refused(play, number):
    envelopes = shared(play).envelopes(1)
    refused(RefusalCode.ROSTER_INVALID, lambda: play.sites[1].open(envelopes | {number: envelopes[2]}))


@pytest.mark.parametrize(
    "dealt",
    [
        np.full((2, 9), 2**32 - 1, np.uint32),
        np.full((2, 9), PRIME, np.uint32),
        np.ones((2, 8), np.uint32),
        np.ones((4, 9), np.uint32),
    ],
    ids=["beyond the field", "no element of it", "too short", "too long"],
)
def test_shares_that_are_none_are_blamed_on_their_dealer(play, monkeypatch, dealt):
    roster = play.gather(play.advertise()).roster
    envelopes = {}
    for n in range(1, 6):
        with monkeypatch.context() as patch:
            if n == 3:
                patch.setattr("fedge.secagg.shamir.split", lambda *_, **__: np.stack([dealt] * 5))
            play.sites[n], shares = play.sites[n].share(roster, play.directory, play.entropy[n])
        envelopes[n] = shares.envelopes.get(1)
    del envelopes[1]
    error = refused(RefusalCode.SHARES_INVALID, lambda: play.sites[1].open(envelopes))
    assert isinstance(error, BlamedError)
    assert error.culprits == (name(3),)


# P3: the survivors.


def masked(play: Play, without: tuple[int, ...] = ()) -> server.Consenting:
    return play.input(shared(play), vectors_for(5, size=4, bits=32), without)[0]


@pytest.mark.parametrize(
    ("survivors", "found"),
    [
        ({1, 2, 3}, "3 members, where 4 are needed"),
        ({2, 3, 4, 5}, "all but this site"),
        ({1, 2, 3, 4, 6}, "not shared"),
        ({0, 1, 2, 3, 4}, "not shared"),
        (set(), "all but this site"),
    ],
)
def test_survivors_that_cannot_be_are_refused(play, survivors, found):
    masked(play)
    refused(RefusalCode.SURVIVORS_INVALID, lambda: play.sites[1].consent(survivors), found)


def test_a_sum_of_fewer_than_the_sites_agreed_on_is_refused_though_they_could_open_it():
    play = Play(6, context(least=6))
    play.input(play.share(play.gather(play.advertise())), vectors_for(6, size=4, bits=32))
    refused(
        RefusalCode.SURVIVORS_INVALID,
        lambda: play.sites[1].consent({1, 2, 3, 4, 5}),
        "5 members, where 6 are needed",
    )


def test_a_survivor_that_has_not_shared_is_refused():
    play = Play(6)
    play.input(play.share(play.gather(play.advertise()), without=[6]), vectors_for(6, size=4, bits=32))
    refused(RefusalCode.SURVIVORS_INVALID, lambda: play.sites[1].consent({1, 2, 3, 4, 5, 6}), "not shared")


# P4: both kinds of share of one member.


def test_two_sets_of_survivors_for_two_halves_open_nothing(play):
    """The attack that secure aggregation falls to without consistency: both of a member's seeds would be rebuilt."""
    masked(play)
    first, second = {1, 2, 3, 4}, {1, 2, 3, 5}
    consents = {}
    for number in (1, 2, 3):
        side = first if number == 1 else second
        play.sites[number], consents[number] = play.sites[number].consent(side)
    play.sites[4], consents[4] = play.sites[4].consent(first)
    play.sites[5], consents[5] = play.sites[5].consent(second)
    for number in range(1, 6):
        refused(RefusalCode.CONSENTS_INVALID, lambda number=number: play.sites[number].reveal(consents))


def consented(play: Play) -> tuple[dict[int, bytes], server.Consenting]:
    consenting = play.consent(masked(play))
    return dict(consenting.consents), consenting


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda c: {n: c[n] for n in (1, 2, 3)}, id="too few"),
        pytest.param(lambda c: dict.fromkeys(c, c[1]), id="one signature for all"),
        pytest.param(lambda c: {n: c[n % 5 + 1] for n in c}, id="each other's"),
        pytest.param(lambda c: {n: bytes(64) for n in c}, id="zeros"),
        pytest.param(lambda c: dict.fromkeys(c, b""), id="nothing"),
    ],
)
def test_consents_that_members_have_not_given_are_refused(play, forge):
    consents, _ = consented(play)
    refused(RefusalCode.CONSENTS_INVALID, lambda: play.sites[1].reveal(forge(consents)), "expected 4")


def test_consents_of_an_earlier_session_are_refused(play):
    earlier, _ = consented(Play(5, context(order=OrderId("train", 2))))
    consented(play)
    refused(RefusalCode.CONSENTS_INVALID, lambda: play.sites[1].reveal(earlier))


def test_consents_of_members_that_have_dropped_out_do_not_count():
    play = Play(5)
    collecting = shared(play)
    vectors = vectors_for(5, size=4, bits=32)
    consenting, _ = play.input(collecting, vectors)
    for n in (1, 2, 3, 4):
        play.sites[n], _ = play.sites[n].consent({1, 2, 3, 4})
    forged = {
        n: signer(n).sign(consent_signed(consenting.sid, n, consenting.roster, frozenset({1, 2, 3, 4})))
        for n in (1, 2, 3, 5)
    }
    refused(RefusalCode.CONSENTS_INVALID, lambda: play.sites[1].reveal(forged), "found 3 of 4")


def test_what_is_revealed_has_room_for_one_share_of_each_member(play):
    collecting = shared(play)
    consenting, _ = play.input(collecting, vectors_for(5, size=4, bits=32), without=[5])
    consenting = play.consent(consenting)
    held = play.sites[1]._held
    reveal = play.sites[1].reveal(consenting.consents)
    assert reveal.shares.shape == (5, 9)
    for at, number in enumerate(range(1, 6)):
        assert (reveal.shares[at] == held[number][1 if number != 5 else 0]).all()


def test_a_late_input_of_a_member_declared_dead_stays_hidden():
    """Its mask key is rebuilt, and its input arrives: the self mask is still on it."""
    play, vectors = Play(5), vectors_for(5, size=16, bits=32)
    collecting = shared(play)
    late = [vector.copy() for vector in vectors[5]]
    opened = play.sites[5].open(collecting.envelopes(5))
    opened.mask(late)
    consenting, total = play.input(collecting, vectors, without=[5])
    consenting = play.consent(consenting)
    revealing = play.reveal(consenting)
    assert same(finish(revealing, total), plain_sum(vectors, [1, 2, 3, 4], 32), 32)
    recovered = revealing.recover()
    site.apply_all(late, add=recovered.subtract[-4:], subtract=recovered.add)  # every pair's mask off it
    assert not same(late, vectors[5], 32)
    site.apply_all(late, subtract=[opened._self_mask])  # which nobody can rebuild: nothing else is left on it
    assert same(late, vectors[5], 32)


def test_a_masked_input_tells_nothing_of_what_is_in_it():
    vectors = vectors_for(5, size=1000, bits=32)

    def first_input(seed: int) -> np.ndarray:
        play = Play(5, seed=seed)
        collecting = shared(play)
        out = [vector.copy() for vector in vectors[1]]
        play.sites[1].open(collecting.envelopes(1)).mask(out)
        return out[0]

    one, two = first_input(1), first_input(2)
    assert (one == two).mean() < 0.01
    assert abs(np.corrcoef(one.astype(float), vectors[1][0].astype(float))[0, 1]) < 0.15
