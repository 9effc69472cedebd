"""The protocol's laws: under any drop-outs the result is the plain sum in the ring, or a typed end."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_sessions import Play, context, finish, plain_sum, same, vectors_for, whole

from fedge.errors import RunError
from fedge.events import OrderId
from fedge.secagg.keys import Suite
from fedge.secagg.session import Context
from fedge.secagg.site import Rules

PHASES = ("advertise", "share", "input", "consent", "reveal")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_result_is_the_sum_of_the_survivors_or_a_typed_end(data: st.DataObject):
    count = data.draw(st.integers(3, 9))
    bits = data.draw(st.sampled_from([8, 12, 32, 64]))
    ppm = data.draw(st.sampled_from([0, 900_000]))
    alive = set(range(1, count + 1))
    drops = {}
    for phase in PHASES:
        # A phase may lose at most two, so that many of the examples come to the end.
        gone = data.draw(st.sets(st.sampled_from(sorted(alive)), max_size=2)) if alive else set()
        if phase == "advertise" and len(alive - gone) < 3:
            gone = set()
        drops[phase] = gone
        alive -= gone
    order = sorted(set(range(1, count + 1)) - drops["advertise"])
    number = {n: at for at, n in enumerate(order, 1)}  # the rest are numbered anew
    for phase in PHASES[1:]:
        drops[phase] = {number[n] for n in drops[phase]}
    play = Play(count, context(threshold_ppm=ppm))
    vectors = vectors_for(count, size=20, bits=bits)
    needed = play.context.needed(len(order))
    left = len(order)
    try:
        total, survivors = whole(play, drops, vectors)
    except RunError:
        gone = 0
        for phase in PHASES[1:]:
            gone += len(drops[phase])
            left = len(order) - gone
            if left < needed:
                return
        raise AssertionError(f"given up with {left} of {needed}") from None
    assert len(order) - sum(len(drops[phase]) for phase in PHASES[1:]) >= needed
    members = [order[n - 1] for n in sorted(survivors)]
    assert same(total, plain_sum(vectors, members, bits), bits)


@pytest.mark.parametrize("suite", list(Suite))
@pytest.mark.parametrize("consistency", [True, False])
@pytest.mark.parametrize(
    "gone", [{}, {"input": [2]}, {"share": [7]}, {"share": [3], "input": [1], "reveal": [5]}]
)
def test_both_suites_and_both_ways_give_the_sum(suite: Suite, consistency: bool, gone):
    play = Play(
        10, context(suite=suite, consistency=consistency), rules=Rules(honest_coordinator=not consistency)
    )
    vectors = vectors_for(10, size=50, bits=32)
    total, survivors = whole(play, gone, vectors)
    assert survivors == set(range(1, 11)) - {n for each in ("share", "input") for n in gone.get(each, ())}
    assert same(total, plain_sum(vectors, survivors, 32), 32)


def test_a_coordinator_finds_wrong_shares_and_goes_on_without_them():
    play, vectors = Play(9), vectors_for(9, size=8, bits=32)
    collecting = play.share(play.gather(play.advertise()))
    consenting, total = play.input(collecting, vectors, without=[4])
    consenting = play.consent(consenting)
    revealing = play.reveal(consenting)
    revealing.revealed[5].shares[:, 0] ^= 1
    assert same(finish(revealing, total), plain_sum(vectors, consenting.survivors, 32), 32)


@pytest.mark.parametrize("members", range(1, 300))
def test_two_quorums_share_more_members_than_may_be_corrupt(members: int):
    needed = context().needed(members)
    corrupt = members - needed  # with more, the honest could not finish
    assert 2 * needed - members > corrupt
    assert needed <= members


def test_a_threshold_above_the_rule_counts_and_one_below_does_not():
    assert context(threshold_ppm=900_000).needed(10) == 9
    assert context(threshold_ppm=1_000_000).needed(10) == 10
    assert context(threshold_ppm=500_000).needed(10) == context().needed(10) == 7


def test_every_field_of_the_context_is_in_its_digest():
    plain = context()
    changed = {
        "order": OrderId("gradient", 3),
        "suite": Suite.X25519_MLKEM768,
        "consistency": False,
    }
    digests = {plain.digest}
    for field in fields(Context):
        value = getattr(plain, field.name)
        more = b"x" if isinstance(value, bytes) else "x" if isinstance(value, str) else 1
        other = changed[field.name] if field.name in changed else value + more

        digests.add(replace(plain, **{field.name: other}).digest)
    for order in (OrderId("train", 4), OrderId("train", 3, 2)):
        digests.add(replace(plain, order=order).digest)
    assert len(digests) == 1 + len(fields(Context)) + 2


TRANSCRIPTS = {
    # Of four sites with fixed seeds, one of which drops out before each phase; three are enough.
    "nobody": "6e0918126db20dcba9ed62f3a504905d6a070e5ae86f6e1c5b77331c22c70163",
    "share": "ce9ddaca9f1a4ee77f8354d5b0f7e02667c3f7172df03a1c76ea0f51d2fd5707",
    "input": "70718b8789f27aa6a4b8976bfd34527aba29c367d121fb40f31444df89890cc1",
    "consent": "4dfa333e3e58cc1ea17a97834f3fde1938db81dfff8437dd35df24be8cb1c2f7",
    "reveal": "6f0114ad9f624a05846d7f7487342b8d3290dad7f130c448cc08b47ecd0b06f7",
}


@pytest.mark.parametrize("phase", list(TRANSCRIPTS))
def test_transcripts_are_as_they_were(phase: str):
    """Whoever changes a byte of a layout, or the order of a derivation, changes what deployed sites understand."""
    play, vectors = Play(4, seed=7), vectors_for(4, size=40, bits=20, seed=7)
    drop = {phase: [2]} if phase != "nobody" else {}
    said = hashlib.sha256()
    adverts = play.advertise()
    for each in adverts.values():
        said.update(each.signed() + each.signature)
    sharing = play.gather(adverts)
    collecting = play.share(sharing, drop.get("share", ()))
    for number, shares in sorted(collecting.shares.items()):
        for other, envelope in sorted(shares.envelopes.items()):
            said.update(bytes([number, other]) + envelope.sealed)
    consenting, total = play.input(collecting, vectors, drop.get("input", ()))
    said.update(b"".join(vector.tobytes() for vector in total))
    consenting = play.consent(consenting, drop.get("consent", ()))
    for number, signature in sorted(consenting.consents.items()):
        said.update(bytes([number]) + signature)
    revealing = play.reveal(consenting, drop.get("reveal", ()))
    for number, reveal in sorted(revealing.revealed.items()):
        said.update(bytes([number]) + reveal.shares.tobytes())
    recovered = revealing.recover()
    said.update(b"".join((*recovered.subtract, *recovered.add)))
    assert said.hexdigest() == TRANSCRIPTS[phase]
