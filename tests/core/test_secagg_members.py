"""Members that lie: what one sends costs it its place, and nobody else anything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from secagg_sessions import (
    FEDERATION,
    Play,
    Stream,
    context,
    name,
    signer,
    vectors_for,
)

from fedge.errors import BlamedError, RemoteProtocolError, RunError
from fedge.secagg import server, site
from fedge.secagg.keys import Suite
from fedge.secagg.session import (
    MAX_MEMBERS,
    Advertisement,
    Envelope,
    InputProof,
    Reveal,
    Shares,
    consent_signed,
    encapsulates,
    input_signed,
)
from fedge.secagg.shamir import PRIME
from fedge.secagg.site import Rules


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


def shared(play: Play) -> server.Collecting:
    return play.share(play.gather(play.advertise()))


def masked(play: Play, without: tuple[int, ...] = ()) -> server.Consenting:
    return play.input(shared(play), vectors_for(5, size=4, bits=32), without)[0]


def consented(play: Play) -> tuple[dict[int, bytes], server.Consenting]:
    consenting = play.consent(masked(play))
    return dict(consenting.consents), consenting


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"context": b"x" * 32}, "for another"),
        ({"mask": b"short"}, "public key of 32 bytes, found 5"),
        ({"channel": b"k" * 33}, "public key of 32 bytes, found 33"),
        ({"mask": bytes(32)}, "low order"),
        ({"channel": b"\x01" + bytes(31)}, "low order"),
        ({"site": "unknown"}, "has signed"),
    ],
)
def test_the_coordinator_refuses_advertisements_that_sites_would_refuse(play, adverts, changes, found):
    """Else one member could have every other refuse the roster, and nobody would know which."""
    with pytest.raises(RemoteProtocolError, match=found):
        server.Gathering(play.context, play.directory).take(sign_again(adverts[1], 1, **changes))


@pytest.mark.parametrize("changes", [{"mask": b"x" * 32}, {"signature": b""}, {"site": name(2)}])
def test_the_coordinator_refuses_advertisements_that_were_changed(play, adverts, changes):
    with pytest.raises(RemoteProtocolError, match="has signed"):
        server.Gathering(play.context, play.directory).take(replace(adverts[1], **changes))


@pytest.mark.parametrize("part", ["channel", "mask", "commitment"])
def test_the_coordinator_refuses_a_key_that_is_there_twice(play, adverts, part):
    gathering = server.Gathering(play.context, play.directory).take(adverts[1])
    for other in {adverts[1].channel, adverts[1].mask, adverts[2].channel, adverts[2].mask} - {
        getattr(adverts[2], part)
    }:
        with pytest.raises(RemoteProtocolError, match="each for one purpose"):
            gathering.take(sign_again(adverts[2], 2, **{part: other}))
    with pytest.raises(RemoteProtocolError, match="found two"):
        gathering.take(adverts[1])


@pytest.mark.parametrize("part", ["channel", "mask"])
def test_the_coordinator_refuses_a_kem_key_that_is_none(part):
    play = Play(3, context(suite=Suite.X25519_MLKEM768))
    advert = play.advertise()[3]
    wrong = sign_again(advert, 3, **{part: getattr(advert, part)[:32] + b"\xff" * 1184})
    with pytest.raises(RemoteProtocolError, match="ML-KEM"):
        server.Gathering(play.context, play.directory).take(wrong)


def test_whoever_comes_when_a_session_is_full_is_refused_and_the_session_is_not(play, adverts):
    others = {f"x{n}": replace(adverts[2], site=f"x{n}") for n in range(MAX_MEMBERS)}
    full = server.Gathering(play.context, play.directory, others)
    with pytest.raises(RemoteProtocolError, match="at most 256 members"):
        full.take(adverts[1])


def test_whoever_is_not_wanted_any_more_is_not_in_the_roster(play, adverts):
    gathering = server.Gathering(play.context, play.directory)
    for advert in adverts.values():
        gathering = gathering.take(advert)
    roster = gathering.only([name(1), name(3), name(4), "somebody"]).close().roster
    assert [member.site for member in roster.members] == [name(1), name(3), name(4)]


def test_the_coordinator_begins_nothing_with_too_few(play, adverts):
    gathering = server.Gathering(play.context, play.directory).take(adverts[1]).take(adverts[2])
    with pytest.raises(RunError, match="expected 3 members"):
        gathering.close()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda s: replace(s, envelopes={}), id="none"),
        pytest.param(lambda s: replace(s, envelopes=dict(list(s.envelopes.items())[:-1])), id="one too few"),
        pytest.param(lambda s: replace(s, envelopes={**s.envelopes, 1: s.envelopes[2]}), id="for itself"),
        pytest.param(lambda s: replace(s, envelopes={**s.envelopes, 2: Envelope(b"short")}), id="short"),
        pytest.param(lambda s: replace(s, recovery={2: bytes(48)}), id="recovery without a KEM"),
    ],
)
def test_the_coordinator_refuses_shares_that_are_not_for_everybody(play, adverts, spoil):
    sharing = play.gather(adverts)
    _, shares = play.sites[1].share(sharing.roster, play.directory, play.entropy[1])
    with pytest.raises(RemoteProtocolError):
        sharing.take(1, spoil(shares))
    with pytest.raises(RemoteProtocolError, match="found two"):
        sharing.take(1, shares).take(1, shares)


@pytest.mark.parametrize("size", [0, 47, 49])
def test_the_coordinator_refuses_what_no_secret_can_be_recovered_from(size: int):
    play = Play(5, context(suite=Suite.X25519_MLKEM768))
    sharing = play.gather(play.advertise())
    _, shares = play.sites[1].share(sharing.roster, play.directory, play.entropy[1])
    first = min(shares.recovery)
    with pytest.raises(RemoteProtocolError, match="to recover each secret"):
        sharing.take(1, replace(shares, recovery={**shares.recovery, first: bytes(size)}))
    sharing.take(1, shares)


def test_the_coordinator_goes_on_with_no_fewer_than_are_needed_to_rebuild_a_seed(play, adverts):
    with pytest.raises(RunError, match="3 of at least 4 members of the session have shared their seeds"):
        play.share(play.gather(adverts), without=[4, 5])


def test_the_coordinator_sums_no_fewer_than_the_sites_agreed_on_though_they_could_be_unmasked():
    play = Play(6, context(least=6))
    collecting = play.share(play.gather(play.advertise()))
    with pytest.raises(RunError, match="5 of at least 6 members of the session have handed in"):
        play.input(collecting, vectors_for(6, size=4, bits=32), without=[6])


def test_the_coordinator_takes_no_input_of_a_member_that_has_not_shared():
    play = Play(6)
    collecting = play.share(play.gather(play.advertise()), without=[6])
    signature = signer(6).sign(input_signed(collecting.sid, 6, b"d" * 32))
    with pytest.raises(RemoteProtocolError, match="each member that shared, found one of 6"):
        collecting.take(6, InputProof(b"d" * 32, signature))


def test_the_coordinator_takes_each_input_once_and_signed(play):
    collecting = shared(play)
    play.sites[1] = play.sites[1].open(collecting.envelopes(1)).mask([])
    proof = play.sites[1].prove(b"d" * 32)
    with pytest.raises(RemoteProtocolError, match="signed"):
        collecting.take(1, InputProof(b"e" * 32, proof.signature))
    with pytest.raises(RemoteProtocolError, match="signed"):
        collecting.take(2, proof)
    with pytest.raises(RemoteProtocolError, match="one input"):
        collecting.take(1, proof).take(1, proof)
    with pytest.raises(RunError, match="1 of at least 4"):
        collecting.take(1, proof).close()


def test_the_coordinator_takes_consents_of_survivors_alone(play):
    consenting = masked(play, without=(5,))
    play.sites[1], signature = play.sites[1].consent(consenting.survivors)
    late = signer(5).sign(consent_signed(consenting.sid, 5, consenting.roster, consenting.survivors))
    for number, wrong in ((2, signature), (5, signature), (5, late), (1, b""), (1, signature + b"x")):
        with pytest.raises(RemoteProtocolError):
            consenting.take(number, wrong)
    with pytest.raises(RunError, match="1 of at least 4"):
        consenting.take(1, signature).close()


def test_the_coordinator_takes_reveals_of_survivors_once_and_of_the_right_shape(play):
    consents, consenting = consented(play)
    revealing, reveal = consenting.close(), play.sites[1].reveal(consents)
    for number, wrong in (
        (6, reveal),
        (1, Reveal(reveal.shares[:-1])),
        (1, Reveal(np.full_like(reveal.shares, 2**32 - 1))),
        (1, Reveal(np.full_like(reveal.shares, PRIME))),
    ):
        with pytest.raises(RemoteProtocolError):
            revealing.take(number, wrong)
    taken = revealing.take(1, reveal)
    with pytest.raises(RemoteProtocolError, match="one reveal"):
        taken.take(1, reveal)
    with pytest.raises(RunError, match="1 of at least 4"):
        taken.recover()


def test_a_dealer_of_wrong_shares_that_drops_out_is_blamed(monkeypatch):
    play, vectors = Play(5), vectors_for(5, size=4, bits=32)
    sharing = play.gather(play.advertise())
    honest = site.shamir.split

    def deal(secrets, **terms):
        return honest([b"x" * 32, b"y" * 32], **terms)

    for n in range(1, 6):
        with monkeypatch.context() as patch:
            if n == 5:
                patch.setattr("fedge.secagg.shamir.split", deal)
            play.sites[n], shares = play.sites[n].share(sharing.roster, play.directory, play.entropy[n])
        sharing = sharing.take(n, shares)
    consenting, _ = play.input(sharing.close(), vectors, without=[5])
    revealing = play.reveal(play.consent(consenting))
    with pytest.raises(BlamedError) as caught:
        revealing.recover()
    assert caught.value.culprits == (name(5),)


def test_members_take_turns_in_sending_what_a_pair_is_sealed_with():
    for count in (4, 7, 10):
        sent = [
            sum(encapsulates(member, other) for other in range(1, count + 1) if other != member)
            for member in range(1, count + 1)
        ]
        assert max(sent) - min(sent) <= 1
    for one, other in ((1, 2), (1, 3), (4, 9), (6, 8)):
        assert encapsulates(one, other) != encapsulates(other, one)


def test_a_session_of_more_members_than_were_agreed_is_not_begun():
    play = Play(5, context(most=4))
    with pytest.raises(RunError, match="4 members of a session at most, found 5"):
        play.gather(play.advertise())


def test_a_member_whose_recovery_was_a_lie_is_blamed():
    play = Play(5, context(suite=Suite.X25519_MLKEM768))
    sharing = play.gather(play.advertise())
    for n in range(1, 6):
        play.sites[n], shares = play.sites[n].share(sharing.roster, play.directory, play.entropy[n])
        if n == 2:
            shares = Shares(shares.envelopes, dict.fromkeys(shares.recovery, bytes(48)))
        sharing = sharing.take(n, shares)
    consenting, _ = play.input(sharing.close(), vectors_for(5, size=4, bits=32), without=[2])
    with pytest.raises(BlamedError) as caught:
        play.reveal(play.consent(consenting)).recover()
    assert caught.value.culprits == (name(2),)


def test_no_secret_is_in_any_repr(play):
    collecting = shared(play)
    advertised = (
        Play(5).advertise() and site.advertise(play.context, name(1), signer(1), Rules(), Stream(5))[0]
    )
    seeds = [advertised._secrets.mask_seed, advertised._secrets.self_seed]
    opened = play.sites[1].open(collecting.envelopes(1))
    shown = " ".join(map(repr, (advertised, play.sites[1], opened, opened.mask([]), advertised._secrets)))
    hidden = [*seeds, opened._self_mask, *opened._masks.values(), opened._held[2].tobytes()]
    assert not any(repr(secret)[2:-1] in shown or secret.hex() in shown for secret in hidden)
    assert FEDERATION in shown
