"""Client-level privacy by the coordinator: what a client can change, how much noise hides that, and when."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import ConfigError
from fedge.events import OrderId
from fedge.learning import Learning
from fedge.pipeline import Clip, Update, l2_norm
from fedge.privacy.banded import coefficients, correlate
from fedge.privacy.central import CLIP, WITHIN, Adaptive, BoundedMetrics, Central, FixedMean, Noising
from fedge.privacy.secure import SecureSource
from fedge.privacy.statement import state
from fedge.run import RunConfig
from fedge.snapshot import revive, take
from fedge.vector import Layout, Model, Tensor
from fedge_strategies import FedAvg, MirroredSgd, Sgd

TRAIN, EVALUATE = OrderId("train", 1), OrderId("evaluate", 1)


def source(number: int = 0) -> SecureSource:
    return SecureSource(number.to_bytes(32, "little"))


def update(client: str, *values: float, **metrics: float) -> Update:
    return Update(client, np.array(values, np.float32), 1, metrics)


def total(mean: FixedMean, *updates: Update) -> np.ndarray:
    """The sum that a reduction gives, one update at a time and the last two together."""
    state = mean.start(len(updates[0].vector))
    for each in updates[:-2]:
        state = mean.fold(state, each)
    return mean.finish(state, *updates[-2:]).vector.astype(np.float64) * mean.size


def run_of(**privacy: object) -> RunConfig:
    table = {"name": "a", "task": "app:task", "rounds": 12, "evaluation": {"every": 0}, "cohort": {"size": 4}}
    known = {"unit": "client", "delta": 1e-5, "clip": 1.0, "epsilon": 3.0}
    return RunConfig.from_table({**table, "privacy": known | privacy}, source="run.toml")


# What one client can change.


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(1e-3, 1e3),
    st.integers(1, 9),
)
def test_a_client_more_or_less_changes_the_sum_by_at_most_the_clip(vectors, clip, size):
    mean = FixedMean(clip, size)
    everybody = [update(str(at), *vector) for at, vector in enumerate(vectors)]
    for left_out in range(len(everybody)):
        others = everybody[:left_out] + everybody[left_out + 1 :]
        without = total(mean, *others) if others else np.zeros(3)
        assert np.linalg.norm(total(mean, *everybody) - without) <= clip * (1 + 1e-5)


def test_the_denominator_does_not_depend_on_who_came():
    for count in (1, 2, 5):
        mean = FixedMean(10.0, 4)
        aggregate = mean.finish(mean.start(2), *(update(str(at), 1.0, 2.0) for at in range(count)))
        np.testing.assert_allclose(aggregate.vector, np.array([1.0, 2.0]) * count / 4)
        assert aggregate.num_examples == count, "whatever they say they weigh"


def test_an_update_beyond_the_clip_is_clipped_here_again_and_one_within_is_not_touched():
    mean = FixedMean(5.0, 1)
    far, near = update("far", 300.0, 400.0), update("near", 3.0, 3.9)
    assert l2_norm(mean.finish(mean.start(2), far).vector) == pytest.approx(5.0, rel=1e-6)
    assert l2_norm(mean.finish(mean.start(2), far).vector) <= 5.0
    assert np.array_equal(mean.finish(mean.start(2), near).vector, near.vector)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), st.floats(1e-2, 1e2))
def test_the_coordinator_knows_which_updates_their_sites_have_clipped(values, clip):
    vector = np.array(values, np.float32)
    norm = l2_norm(vector)
    encoded = Clip(clip).encode(vector)
    mean = FixedMean(clip, 1)
    within = mean.finish(mean.start(len(values)), Update("a", encoded, 1)).metrics[WITHIN]
    if not clip * (1 - 1e-5) <= norm <= clip:  # as good as clipped
        assert within == float(norm <= clip)


def test_no_metric_of_a_client_is_released_beside_its_update():
    learning, aggregate = closed(central(), update("a", 1.0, 0.0, secret=4711.0))
    assert aggregate.metrics == {CLIP: 1.0}
    assert learning.folds == {}


# Noise.


def central(**settings: object) -> Central:
    return replace(Central(2.0, 1.0, 4), **settings)


def learning_of(central: Central, *, size: int = 2, buffers: int = 0) -> Learning:
    tensors = [Tensor("w", (size,))] + [Tensor("b", (buffers,), role="buffer")] * bool(buffers)
    return Learning.begin(
        FedAvg(), Model(np.zeros(size + buffers, np.float32), Layout(tuple(tensors))), central
    )


def closed(central: Central, *updates: Update, number: int = 0):
    return learning_of(central, size=len(updates[0].vector)).close(TRAIN, *updates, source=source(number))


@pytest.mark.parametrize("clip", [0.1, 7.0])
def test_the_noise_on_the_mean_is_the_multiplier_times_the_clip_over_the_size(clip: float):
    size = 200_000
    zero = Update("a", np.zeros(size, np.float32), 1)
    learning, _ = closed(central(clip=clip), zero)
    deviation = 2.0 * clip / 4
    assert learning.model.vector.std() == pytest.approx(deviation, rel=0.01)
    assert abs(learning.model.vector.mean()) < 5 * deviation / math.sqrt(size)


def test_a_round_of_updates_of_zero_is_noised_like_any_other():
    learning, _ = closed(central(), update("a", 0.0, 0.0))
    assert learning.model.vector.all()


def test_every_round_has_noise_of_its_own():
    learning, drawn, shared = learning_of(central()), [], source()
    for round in (1, 2, 3):
        before = learning.model.vector
        learning, _ = learning.close(OrderId("train", round), update("a", 0.0, 0.0), source=shared)
        drawn.append(tuple(learning.model.vector - before))
    assert len(set(drawn)) == 3


def test_without_a_source_of_noise_nothing_is_closed():
    with pytest.raises(ValueError, match="expected a source of noise"):
        learning_of(central()).close(TRAIN, update("a", 1.0, 2.0))


def test_what_is_not_trained_gets_neither_noise_nor_what_clients_say():
    learning = learning_of(central(), size=2, buffers=2)
    learning, _ = learning.close(TRAIN, update("a", 0.1, 0.1, 0.5, 0.5), source=source())
    assert learning.model.vector[:2].all()
    assert not learning.model.vector[2:].any()


@pytest.mark.parametrize("strategy", [FedAvg(), MirroredSgd()], ids=repr)
def test_every_strategy_of_rounds_takes_the_noised_aggregate(strategy):
    model = Model(np.zeros(4, np.float32), Layout((Tensor("w", (4,)),)))
    begun = Learning.begin(strategy, model, central())
    learning, _ = begun.close(OrderId(begun.order(1).kind, 1), update("a", 0, 0, 0, 0), source=source())
    assert learning.model.vector.all()
    assert learning.order(2).clip == 1.0


def test_a_strategy_that_steps_at_every_update_is_refused():
    with pytest.raises(ConfigError, match="steps at every update"):
        Learning.begin(Sgd(), Model(np.zeros(1, np.float32), Layout((Tensor("w", (1,)),))), central())


# An evaluation.


def test_metrics_are_summed_within_their_bounds_and_divided_by_a_fixed_number():
    mean = BoundedMetrics(4, 2.0)
    state = mean.fold(mean.start(0), Update("a", np.zeros(0, np.float32), 1, {"loss": 9.0, "accuracy": 0.5}))
    found = mean.finish(state, Update("b", np.zeros(0, np.float32), 1, {"loss": math.nan, "accuracy": -1.0}))
    assert found.metrics == {"loss": 2.0 / 4, "accuracy": 0.5 / 4}
    assert found.clients == ("a", "b")


def test_the_noise_on_metrics_is_for_all_of_them_together():
    told = []
    evaluating = central(evaluation_noise_multiplier=3.0, evaluation_size=10, loss_bound=5.0)
    learning = learning_of(evaluating)
    shared = source()
    for _ in range(4000):
        _, aggregate = learning.close(
            EVALUATE, Update("a", np.zeros(0, np.float32), 1, {"loss": 0.0, "accuracy": 0.0}), source=shared
        )
        told.append([aggregate.metrics["loss"] / 5.0, aggregate.metrics["accuracy"]])
    deviation = 3.0 * math.sqrt(2) / 10
    np.testing.assert_allclose(np.std(told, axis=0), deviation, rtol=0.05)


# The clip that adapts.


def test_the_clip_rises_when_too_many_updates_are_clipped_and_falls_when_too_few_are():
    adaptive = Adaptive(0.5, 0.2, 1.0)
    assert adaptive.next(1.0, 0.0) == pytest.approx(math.exp(0.1)), "nobody is within: up"
    assert adaptive.next(1.0, 1.0) == pytest.approx(math.exp(-0.1)), "everybody is within: down"
    assert adaptive.next(1.0, 0.5) == 1.0


def test_the_clip_finds_the_quantile_of_the_norms():
    norms = np.random.default_rng(0).lognormal(1.0, 0.5, 100)
    adaptive = Adaptive(0.5, 0.2, 5.0)
    learning = learning_of(Central(1.0, 0.05, 100, adaptive=adaptive))
    shared, clips = source(), []
    for round in range(1, 121):
        clip = learning.order(round).clip
        clips.append(clip)
        updates = [
            Update(str(at), Clip(clip).encode(np.array([norm, 0.0], np.float32)), 1)
            for at, norm in enumerate(norms)
        ]
        learning, aggregate = learning.close(OrderId("train", round), *updates, source=shared)
        assert aggregate.metrics[CLIP] == clip
        assert set(aggregate.metrics) == {CLIP, WITHIN}
    assert np.mean(clips[-40:]) == pytest.approx(np.median(norms), rel=0.15)


def test_the_count_of_clipped_updates_is_noised_and_pays_for_it():
    told = []
    adaptive = Adaptive(0.5, 0.2, 3.0)
    central = Central(2.0, 1.0, 4, adaptive=adaptive)
    learning, shared = learning_of(central), source()
    for _ in range(4000):
        _, aggregate = learning.close(TRAIN, update("a", 0.1, 0.1), update("b", 5.0, 5.0), source=shared)
        told.append(aggregate.metrics[WITHIN])
    assert np.mean(told) == pytest.approx(0.5, abs=0.05)  # one of two is within
    assert np.std(told) == pytest.approx(3.0 / 4, rel=0.05)
    # Andrew et al. 2021, theorem 1: both together are as one release at the noise multiplier of the whole.
    assert central.vector_noise_multiplier**-2 + (2 * 3.0) ** -2 == pytest.approx(2.0**-2)
    assert central.vector_noise_multiplier > 2.0


def test_a_count_that_would_take_the_whole_budget_is_refused():
    with pytest.raises(ConfigError, match="half the noise multiplier of a client's whole turn"):
        Central.of(run_of(noise_multiplier=4.0, epsilon=None, adaptive_clip={"noise_multiplier": 2.0}))


# Correlated noise.


def matrix(bands: int, rounds: int) -> np.ndarray:
    column = np.zeros(rounds)
    column[: min(bands, rounds)] = coefficients(bands)[:rounds]
    return np.array(
        [[column[row - at] if row >= at else 0.0 for at in range(rounds)] for row in range(rounds)]
    )


@given(st.integers(1, 12), st.data())
def test_turns_that_are_far_enough_apart_are_worth_as_many_independent_releases(bands, data):
    """The sensitivity of C for k turns is at most sqrt(k), whatever a client sends in each of them."""
    gaps = data.draw(st.lists(st.integers(bands, bands + 5), min_size=1, max_size=6))
    turns = np.cumsum(gaps) - gaps[0]
    signs = data.draw(st.lists(st.floats(-1, 1), min_size=len(turns), max_size=len(turns)))
    sent = np.zeros(int(turns[-1]) + bands + 1)
    sent[turns] = signs
    assert np.linalg.norm(matrix(bands, len(sent)) @ sent) <= math.sqrt(len(turns)) * (1 + 1e-9)


def test_turns_that_are_too_close_would_not_be_hidden():
    sent = np.zeros(9)
    sent[:2] = 1.0
    assert np.linalg.norm(matrix(4, 9) @ sent) > 1.2 * math.sqrt(2)


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_the_noise_of_a_round_is_the_matrix_inverse_of_independent_noise(bands: int):
    fresh = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    recent: tuple[np.ndarray, ...] = ()
    made = []
    for row in fresh:
        noise = correlate(row.copy(), recent, bands)
        recent = (noise, *recent)[: bands - 1]
        made.append(noise)
    np.testing.assert_allclose(matrix(bands, 9) @ np.array(made), fresh, atol=1e-5)


@pytest.mark.parametrize("bands", [4, 16])
def test_a_model_carries_less_of_correlated_noise_than_of_independent(bands: int):
    """The mean square of all prefix sums, against independent noise of the same cost."""
    rounds = 64
    prefix = np.tril(np.ones((rounds, rounds)))
    error = np.linalg.norm(prefix @ np.linalg.inv(matrix(bands, rounds))) / np.linalg.norm(prefix)
    assert error < 0.75


def test_a_run_of_rounds_adds_up_to_less_noise_with_bands():
    ends = {}
    for bands in (1, 8):
        learning, shared = learning_of(central(bands=bands), size=20_000), source()
        zero = Update("a", np.zeros(20_000, np.float32), 1)
        for round in range(1, 33):
            learning, _ = learning.close(OrderId("train", round), zero, source=shared)
        ends[bands] = learning.model.vector.std()
    assert ends[1] == pytest.approx(2.0 / 4 * math.sqrt(32), rel=0.05)
    assert ends[8] < 0.75 * ends[1]


def test_a_checkpoint_holds_the_clip_and_no_noise():
    learning = learning_of(central(bands=4, adaptive=Adaptive(0.5, 0.2, 3.0)))
    for round in (1, 2):
        learning, _ = learning.close(OrderId("train", round), update("a", 1.0, 1.0), source=source(round))
    assert len(learning.noising.recent) == 2
    kept = take(learning.kept)
    assert set(kept.arrays) == {"state.state.model"}
    begun = learning_of(learning.central)
    revived = begun.revived(revive(kept, begun.kept))
    assert revived.noising.recent == ()
    assert revived.noising.clip == learning.noising.clip != 1.0
    assert np.array_equal(revived.model.vector, learning.model.vector)
    assert "[" not in repr(Noising(1.0, (np.ones(3, np.float32),)))


# What a run asks for, and what is said of it.


def test_a_run_is_priced_by_a_clients_turns():
    every_round, sometimes, apart = (
        Central.of(run_of(**more)) for more in ({}, {"max_participations": 3}, {"separation": 4})
    )
    assert every_round.noise_multiplier > sometimes.noise_multiplier
    assert apart.noise_multiplier == sometimes.noise_multiplier, "12 rounds, every fourth at most"
    assert (apart.bands, apart.size) == (4, 4)
    assert Central.of(RunConfig.from_table(run_of().model_dump(exclude={"privacy"}), source="x")) is None


def test_a_statement_of_a_run_counts_the_turns_that_were_taken():
    run = run_of(noise_multiplier=10.0, epsilon=None)
    one = state(run, "a-1", "stopped", [["x", "y"]], Layout((Tensor("w", (2,)),)))
    four = state(run, "a-1", "stopped", [["x", "y"]] * 4, Layout((Tensor("w", (2,)),)))
    assert four.epsilon > one.epsilon > 0
    assert (one.unit, one.participations, one.accountant) == ("client", 1, "PLD")
    assert "the coordinator" in one.trust
    assert state(run, "a-1", "failed", [], Layout((Tensor("w", (2,)),))).epsilon == 0
