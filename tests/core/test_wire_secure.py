"""Messages of secure aggregation come back as they went, and what is none is a clear error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from secagg_sessions import Play, context, vectors_for

from fedge.errors import LimitError, RemoteProtocolError
from fedge.secagg.keys import Suite
from fedge.secagg.session import MAX_MEMBERS, Reveal
from fedge.secagg.terms import SumTerms
from fedge.wire import fedge_pb2 as pb
from fedge.wire import secure
from fedge.wire.agreed import offer_digest

ORDER = pb.OrderId(kind=pb.KIND_TRAIN, round=3, attempt=1)
TERMS = SumTerms(least=5, clients=40, bound=2.5, bits=24, rotate=True, metrics=("loss", "accuracy"))


@pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.name)
def test_a_session_over_the_wire_gives_the_values_that_went_in(suite: Suite):
    play = Play(4, context(suite=suite))
    sharing = play.gather(play.advertise())
    roster = secure.decode_roster(secure.encode_members(sharing.roster))
    assert roster == sharing.roster
    collecting = play.share(sharing)
    for shares in collecting.shares.values():
        assert secure.decode_shares(secure.encode_shares(shares)) == shares
    envelopes = collecting.envelopes(2)
    assert secure.decode_envelopes(secure.encode_envelopes(envelopes)) == envelopes
    play.input(collecting, vectors_for(4, size=4, bits=32))


def test_only_what_is_for_its_recipient_is_in_an_envelope_that_is_handed_on():
    play = Play(3, context(suite=Suite.X25519_MLKEM768))
    collecting = play.share(play.gather(play.advertise()))
    assert all(shares.recovery for number, shares in collecting.shares.items() if number < 3)
    assert not any(each.recovery for each in secure.encode_envelopes(collecting.envelopes(3)))


@pytest.mark.parametrize("terms", [TERMS, replace(TERMS, suite=Suite.X25519_MLKEM768, consistency=False)])
def test_terms_come_back(terms: SumTerms):
    assert secure.decode_sum_terms(secure.encode_sum_terms(terms)) == terms


@pytest.mark.parametrize(
    "changes",
    [
        {"suite": 0},
        {"suite": 9},
        {"least": 2},
        {"least": 41},
        {"least": 300, "clients": 400},
        {"clients": 1 << 31},
        {"bits": 7},
        {"bits": 64},
        {"bound": 0.0},
        {"bound": float("nan")},
        {"bound": float("inf")},
        {"max_weight": 0},
        {"threshold_ppm": 1_000_001},
        {"metrics": ["loss"] * 2},
        {"metrics": [str(n) for n in range(100)]},
    ],
    ids=str,
)
def test_terms_that_cannot_be_kept_are_refused(changes: dict[str, Any]):
    fields = {
        "suite": 1,
        "least": 5,
        "clients": 40,
        "bound": 1.0,
        "bits": 32,
        "max_weight": 1,
        "consistency": True,
    }
    with pytest.raises(RemoteProtocolError, match="not terms of secure aggregation"):
        secure.decode_sum_terms(pb.SecureAggregation(**(fields | changes)))


def test_consents_come_back_and_each_number_is_there_once():
    consents = {1: b"a" * 64, 7: b"b" * 64}
    message = secure.encode_consents("run", ORDER, consents)
    assert secure.decode_consents(message) == consents
    for numbers, signatures in (([1, 1], [b"a", b"b"]), ([1], []), ([1], [b"a", b"b"])):
        with pytest.raises(RemoteProtocolError, match="one consent of each number"):
            secure.decode_consents(pb.Consents(numbers=numbers, signatures=signatures))


def test_shares_that_are_revealed_come_back():
    shares = np.arange(4 * 9, dtype=np.uint32).reshape(4, 9)
    assert (secure.decode_reveal(secure.encode_reveal(Reveal(shares))).shares == shares).all()
    for size in (1, 35, 36 * (MAX_MEMBERS + 1)):
        with pytest.raises(RemoteProtocolError, match="expected shares"):
            secure.decode_reveal(bytes(size))


def test_more_than_a_session_has_members_is_refused_before_it_is_looked_at():
    many = range(1, MAX_MEMBERS + 2)
    with pytest.raises(LimitError):
        secure.decode_roster(pb.Member(site=f"site-{n}") for n in many)
    with pytest.raises(LimitError):
        secure.decode_shares(pb.Envelope(number=n) for n in many)
    with pytest.raises(LimitError):
        secure.decode_consents(pb.Consents(numbers=many))
    with pytest.raises(RemoteProtocolError, match="one envelope of each number"):
        secure.decode_envelopes([pb.Envelope(number=1), pb.Envelope(number=1)])
    with pytest.raises(RemoteProtocolError, match="roster: "):
        secure.decode_roster([pb.Member(site="no/name")])


OFFERS = st.builds(
    pb.Offer,
    run_id=st.text(max_size=3),
    task=st.text(max_size=3),
    rounds=st.integers(0, 3),
    clip=st.one_of(st.none(), st.floats(allow_nan=False)),
    work=st.builds(pb.Work, epochs=st.one_of(st.none(), st.integers(0, 2)), learning_rate=st.floats(0, 1)),
    layout=st.builds(
        pb.Layout,
        tensors=st.lists(
            st.builds(pb.Tensor, name=st.text(max_size=2), shape=st.lists(st.integers(0, 3), max_size=2)),
            max_size=2,
        ),
    ),
    secure_aggregation=st.one_of(st.none(), st.builds(pb.SecureAggregation, metrics=st.lists(st.text()))),
)


@given(OFFERS, OFFERS)
def test_two_offers_have_one_digest_only_if_they_say_the_same(one: pb.Offer, other: pb.Offer):
    same = one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
    assert (offer_digest(one) == offer_digest(other)) == same
    assert offer_digest(pb.Offer.FromString(one.SerializeToString())) == offer_digest(one)


def test_the_digest_of_an_offer_is_what_other_versions_say_it_is():
    offer = pb.Offer(
        run_id="run-1",
        clip=0.5,
        rounds=2,
        layout=pb.Layout(tensors=[pb.Tensor(name="w", shape=[2, 3], dtype="float32", role="param")]),
        secure_aggregation=secure.encode_sum_terms(TERMS),
    )
    assert offer_digest(offer).hex() == "15b70e00735d419ea1cfa8586eb4c36697092c26ea20a277ebd0f712dbdea00c"
