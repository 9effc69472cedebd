"""Client-level privacy inside a secure sum: who adds how much noise, and what comes of it once the masks are off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from secagg_sessions import Play, context, finish

from fedge.errors import ConfigError, RemoteProtocolError
from fedge.events import OrderId
from fedge.privacy.mechanism import Skellam, scaled
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.secure import SecureSource
from fedge.privacy.statement import state
from fedge.privacy.terms import Terms, price
from fedge.run import RunConfig, Work
from fedge.secagg.encoding import Summed, mean_of
from fedge.secagg.noise import Noise, honest_of, noise_for
from fedge.secagg.session import needed
from fedge.secagg.tail import Summary
from fedge.secagg.terms import SumTerms
from fedge.vector import Layout, Tensor
from fedge.wire.secure import decode_sum_terms, encode_sum_terms
from fedge_strategies import FedAvg

LAYOUT = Layout((Tensor("w", (40,)), Tensor("running", (3,), role="buffer")))
SIZE = LAYOUT.trainable_size


def source(number: int = 0) -> SecureSource:
    return SecureSource(number.to_bytes(32, "little"))


def run_of(*, cohort: Any = None, secure: Any = None, rounds: int = 12, **privacy: Any) -> RunConfig:
    known = {"unit": "client", "delta": 1e-5, "clip": 1.0, "epsilon": 3.0}
    table = {
        "name": "a",
        "task": "app:task",
        "rounds": rounds,
        "cohort": {"size": 9, **(cohort or {})},
        "privacy": known | privacy,
        "secure_aggregation": {"enabled": True, **(secure or {})},
    }
    return RunConfig.from_table(table, source="run.toml")


def terms_of(**settings: Any) -> SumTerms:
    found = SumTerms.of(run_of(**settings), FedAvg(), LAYOUT)
    assert found is not None
    return found


# How many of those in a sum are honest.


@given(st.integers(3, 256), st.integers(0, 60), st.sampled_from([0, 700_000, 900_000, 1_000_000]))
def test_of_every_sum_that_sites_consent_to_so_many_are_honest_and_no_more_are_counted_on(least, more, ppm):
    most = min(least + more, 256)
    honest = honest_of(least, most, ppm)
    left = [
        survivors - members // 3
        for members in range(least, most + 1)
        for survivors in range(max(needed(members, ppm), least), members + 1)
    ]
    assert honest == min(left)
    assert honest >= 1
    # What is assumed is what the protocol itself can bear: more corrupt members could ask for both kinds of share.
    assert all(2 * needed(members, ppm) - members > members // 3 for members in range(least, most + 1))


@pytest.mark.parametrize(
    ("cohort", "threshold", "honest"),
    [
        ({"size": 9}, None, 6),
        ({"size": 9, "quorum": 6}, None, 4),
        ({"size": 100, "quorum": 70}, None, 37),
        ({"size": 100, "quorum": 70}, 1.0, 47),
    ],
)
def test_noise_is_reckoned_with_the_smallest_sum_that_the_run_takes(cohort, threshold, honest):
    secure = {"threshold": threshold} if threshold else {}
    assert terms_of(cohort=cohort, secure=secure).honest == honest


# How much they add.


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("rotate", [False, True])
def test_the_noise_keeps_a_runs_epsilon_and_is_hardly_more_than_that_takes(epsilon: float, rotate: bool):
    terms = terms_of(epsilon=epsilon, secure={"rotate": rotate})
    assert terms.mechanism is not None
    assert 0.99 * epsilon <= epsilon_of([scaled(terms.mechanism, 12)], 1e-5) <= epsilon


def test_with_rotation_few_bits_have_room_for_finer_steps_of_long_updates():
    layout = Layout((Tensor("w", (40_000,)),))

    def steps(bits: int, rotate: bool) -> float:
        run = run_of(epsilon=None, noise_multiplier=0.5, secure={"rotate": rotate, "bits": bits})
        terms = SumTerms.of(run, FedAvg(), layout)
        assert terms is not None
        assert terms.noise is not None
        return terms.noise.steps

    assert steps(16, rotate=True) > 1.9 * steps(16, rotate=False)
    assert steps(32, rotate=True) == steps(32, rotate=False)


def test_a_fixed_noise_multiplier_is_that_of_the_noise_of_the_honest():
    terms = terms_of(epsilon=None, noise_multiplier=2.5, cohort={"size": 12, "quorum": 9})
    mechanism = terms.mechanism
    assert mechanism is not None
    assert terms.noise is not None
    assert mechanism.variance == terms.honest * terms.noise.variance
    assert math.sqrt(mechanism.variance) == pytest.approx(2.5 * mechanism.l2, rel=1e-9)


def test_fewer_participations_are_paid_with_less_noise():
    often, seldom = terms_of().mechanism, terms_of(max_participations=3).mechanism
    assert often is not None
    assert seldom is not None
    assert often.variance / often.l2**2 > seldom.variance / seldom.l2**2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epsilon": 1e-5}, "larger epsilon"),
        ({"secure": {"bits": 8}, "epsilon": 0.2}, "no grid of 8 bits"),
    ],
)
def test_noise_that_cannot_be_is_refused_when_the_run_is_configured(settings: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        terms_of(**settings)


def test_a_price_is_that_of_the_sums_and_what_they_do_not_keep_is_no_price():
    run = run_of()
    terms, sums = Terms.of(run), terms_of()
    assert terms is not None
    assert sums.mechanism is not None
    found = price(terms, Work(), "train", 1, summed=sums.mechanism)
    assert found.order == sums.mechanism
    assert found.run == (scaled(sums.mechanism, 12),)
    less = replace(sums.mechanism, variance=sums.mechanism.variance / 1.1)
    with pytest.raises(ValueError, match=r"too little for epsilon 3 at delta 1e-05"):
        price(terms, Work(), "train", 1, summed=less)
    promised = replace(terms, epsilon=None, noise_multiplier=found.noise_multiplier)
    assert price(promised, Work(), "train", 1, summed=sums.mechanism).order == sums.mechanism
    with pytest.raises(ValueError, match="expected sums with noise multiplier"):
        price(promised, Work(), "train", 1, summed=less)


# What is agreed.


def test_noise_is_part_of_the_terms_and_of_the_context_that_all_members_sign():
    terms = terms_of()
    assert decode_sum_terms(encode_sum_terms(terms)) == terms
    assert terms.noise is not None

    def digest(of: SumTerms) -> bytes:
        order = OrderId("train", 1)
        return of.context(federation="f", run_id="r", order=order, offer=b"o", model=b"m", epoch=1).privacy

    other = replace(terms, noise=replace(terms.noise, variance=terms.noise.variance / 2))
    assert len({digest(terms), digest(other), digest(replace(terms, noise=None))}) == 3


@pytest.mark.parametrize("field", ["size", "steps", "variance"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_noise_out_of_range_is_no_noise(field: str, value: float):
    with pytest.raises(ValueError, match=field):
        replace(Noise(3, 1.0, 1.0), **{field: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": ("loss",)},
        {"max_weight": 2},
        {"noise": Noise(SIZE, 1e9, 1.0)},
        {"noise": Noise(SIZE, 1.0, 2.0**31)},
        {"noise": Noise(SIZE, 1e-9, 1e-31)},
    ],
    ids=["metrics beside it", "weights", "a grid that wraps", "a table without end", "noise without a price"],
)
def test_private_sums_that_cannot_be_are_none_over_the_wire_either(changes: dict[str, Any]):
    message = encode_sum_terms(terms_of())
    for name, value in changes.items():
        message.ClearField(name)  # type: ignore[arg-type]  # a field's name
        if isinstance(value, Noise):
            message.noise.size, message.noise.steps, message.noise.variance = (
                value.size,
                value.steps,
                value.variance,
            )
        elif isinstance(value, tuple):
            message.metrics.extend(value)
        else:
            setattr(message, name, value)
    with pytest.raises(RemoteProtocolError, match="not terms of secure aggregation"):
        decode_sum_terms(message)


# The whole way: clip, rotate, scale, round, add noise, mask; and back.


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [18, 32])
def test_behind_the_masks_is_the_sum_of_the_clipped_updates_and_the_noise_of_those_who_came_through(
    rotate: bool, bits: int
):
    layout = Layout((Tensor("w", (3000,)), Tensor("running", (2,), role="buffer")))
    run = run_of(
        epsilon=None, noise_multiplier=1.0, cohort={"quorum": 7}, secure={"rotate": rotate, "bits": bits}
    )
    terms = SumTerms.of(run, FedAvg(), layout)
    assert terms is not None
    assert terms.noise is not None
    encoding = terms.encoding(layout.size, b"seed")
    rng = np.random.default_rng(3)
    updates = {}
    for number in range(1, 10):
        update = np.zeros(layout.size, np.float32)
        update[:3000] = rng.standard_normal(3000) * (
            0.001 if number % 2 else 1.0
        )  # every other one is clipped
        updates[number] = update
    play = Play(9, context(least=terms.least, most=terms.members))
    vectors = {
        number: encoding.encode(update, 1, {"loss": 3.0}, source(number))
        for number, update in updates.items()
    }
    collecting = play.share(play.gather(play.advertise()), [4])
    consenting, total = play.input(collecting, vectors, [7])
    total = finish(play.reveal(play.consent(consenting)), total)
    survivors = {1, 2, 3, 5, 6, 8, 9}
    assert consenting.survivors == survivors

    found = encoding.decode(total, len(survivors))
    exact = np.zeros(layout.size)
    for number in survivors:
        norm = float(np.linalg.norm(updates[number].astype(np.float64)))
        exact += updates[number] * min(1.0, 1.0 / norm)
    error = found.vector - exact
    deviation = math.sqrt(len(survivors) * (terms.noise.variance + 0.25)) / terms.noise.steps
    assert not error[3000:].any(), "nothing is summed where no noise is added"
    assert error[:3000].std() == pytest.approx(deviation, rel=0.07)
    assert abs(error[:3000].mean()) < 5 * deviation / math.sqrt(3000)
    # The honest alone have added what is paid for: without a third of the nine, in the smallest sum.
    mechanism = terms.mechanism
    assert mechanism is not None
    assert terms.honest == 7 - 3
    honest = math.sqrt(terms.honest * terms.noise.variance)
    assert honest == pytest.approx(1.0 * mechanism.l2, rel=1e-9)
    assert dict(found.summary.totals) == {}, "no metric rides beside a private sum"
    assert (found.summary.members, found.summary.weight) == (7, 7)


def test_an_update_with_something_where_no_noise_is_added_is_not_encoded():
    update = np.zeros(LAYOUT.size, np.float32)
    update[-1] = 1e-20
    with pytest.raises(ValueError, match="zeros where no noise is added"):
        terms_of().encoding(LAYOUT.size, b"").encode(update, 1, {}, source())


def test_private_sums_are_divided_by_a_number_that_does_not_depend_on_who_came():
    summed = Summed(np.array([4.0, 8.0]), Summary(2, 2, {}))
    assert mean_of([summed], ["a", "b"], 4).vector.tolist() == [1.0, 2.0]
    assert mean_of([summed, summed], ["a", "b", "c", "d"], 8).vector.tolist() == [1.0, 2.0]


# What is said of it.


def test_a_statement_names_who_adds_the_noise_and_whom_it_protects_from():
    run = run_of(epsilon=None, noise_multiplier=8.0)
    one, four = (state(run, "a-1", "stopped", [["x", "y"]] * rounds, LAYOUT) for rounds in (1, 4))
    assert one.epsilon is not None
    assert four.epsilon is not None
    assert state(run, "a-1", "failed", [], LAYOUT).epsilon == 0
    assert (one.unit, one.accountant) == ("client", "RDP")
    assert "no single party" in one.trust
    assert "Skellam noise of 8 x the L2 sensitivity" in one.mechanism
    mechanism = terms_of(epsilon=None, noise_multiplier=8.0).mechanism
    assert isinstance(mechanism, Skellam)
    # Attempts that came to nothing are releases as well: as many as the run has paid for.
    assert one.epsilon == four.epsilon == epsilon_of([scaled(mechanism, 12)], 1e-5)
    assert "taking part counts as known" in one.adjacency


def test_noise_for_a_longer_update_is_as_strong_for_each_of_its_elements():
    terms = Terms.of(run_of())
    assert terms is not None
    found = [
        noise_for(terms, size, honest=6, clients=9, bound=1.0, bits=32) for size in (1, 1000, 10_000_000)
    ]
    deviations = [math.sqrt(noise.variance) / noise.steps for noise in found]
    assert deviations == pytest.approx([deviations[0]] * 3, rel=0.02)


def test_what_rounding_adds_to_the_norm_is_told_and_less_with_more_bits():
    """At 32 bits it is about the hundredth that the grid is made for."""
    found = [terms_of(secure={"bits": bits}).rounding for bits in (14, 16, 32)]
    assert found[0] > found[1] >= found[2]
    assert 1 < found[2] < 1.02
    in_clear = SumTerms(least=3, clients=4, bound=1.0)
    assert in_clear.rounding == 1.0
