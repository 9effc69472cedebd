"""DP-SGD in the trainer: what leaves is clipped and noised as was asked; broken variants are caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedge import Task
from fedge.errors import RefusedError
from fedge.privacy.example import ExampleLevel, Schedule
from fedge.privacy.mechanism import Gaussian, SampledGaussian
from fedge.privacy.secure import SecureSource
from fedge.refusal import RefusalCode
from fedge.run import Work
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_client.torch.framework import framework
from fedge_client.torch.private.steps import Private
from fedge_client.torch.trainer import Trainer

CLIP, SIGMA = 0.5, 1.5


def level(**fields: Any) -> ExampleLevel:
    return ExampleLevel(**({"clip": CLIP, "noise_multiplier": SIGMA} | fields))


def private(key: int = 0, **fields: Any) -> Private:
    return Private(level(**fields), SecureSource(key.to_bytes(32, "little")))


def linear() -> nn.Module:
    return nn.Linear(20, 10, bias=False)


def data(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 20, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 10, (count,), generator=generator))


def nothing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is zero: what a step does is its noise."""
    return output.sum() * 0


def task(model: Callable[[], nn.Module] = linear, loss: Any = cross_entropy, **metrics: Any) -> Task:
    return Task(model=model, data=lambda site: (None, None), loss=loss, metrics=metrics)


def train(
    of: Task, dataset: Any, work: Work, how: Private | None, *, gradient: bool = False, seed: int = 3
) -> tuple[Array, Outcome]:
    trainer = Trainer(of, seed=1)
    model = framework.initial_model(of, seed=1).vector
    out = np.full_like(model, np.nan)
    if gradient:
        done = trainer.gradient(model, dataset, work, seed=seed, step=0, out=out, private=how)
    else:
        done = trainer.train(model, dataset, work, seed=seed, out=out, private=how)
    return out, done


ONE_STEP = Work(steps=1, batch_size=10, learning_rate=1.0)


# Noise.


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_without_any_gradient_is_noise_of_exactly_the_demanded_deviation(gradient):
    """A halved sigma, no noise at all, or one that is not scaled by the clip would be seen here."""
    found = np.concatenate(
        [train(task(loss=nothing), data(50), ONE_STEP, private(k), gradient=gradient)[0] for k in range(20)]
    )
    expected = SIGMA * CLIP / 10
    assert abs(found.std() / expected - 1) < 5 / math.sqrt(2 * len(found))
    assert abs(found.mean()) < 5 * expected / math.sqrt(len(found))


def test_an_empty_sample_is_a_noised_and_counted_step():
    tiny = Work(steps=3, batch_size=1, learning_rate=1.0)
    few = data(200)
    found = [train(task(), few, tiny, Private(level(), EmptySamples(bytes([k]) * 32))) for k in range(10)]
    noise = np.concatenate([delta for delta, _ in found])
    assert abs(noise.std() / (SIGMA * CLIP * math.sqrt(3)) - 1) < 0.1
    assert {outcome.mechanism for _, outcome in found} == {SampledGaussian(SIGMA, 1 / 200, 3)}


class EmptySamples(SecureSource):
    """Samples that happen to be empty."""

    def poisson_sample(self, size: int, rate: float) -> Any:
        return super().poisson_sample(size, rate)[:0]


def test_noise_is_never_used_twice():
    """Not in two steps of one order, not in two orders of different keys, not in two parts of the vector."""
    one = train(task(loss=nothing), data(50), ONE_STEP, private(1))[0]
    again = train(task(loss=nothing), data(50), ONE_STEP, private(1))[0]
    other = train(task(loss=nothing), data(50), ONE_STEP, private(2))[0]
    np.testing.assert_array_equal(one, again)  # a simulation's noise follows from its seed
    two = train(task(loss=nothing), data(50), Work(steps=2, batch_size=10, learning_rate=1.0), private(1))[0]
    for a, b in [(one, other), (one, two - one), (one[:100], one[100:])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))
    assert len(np.unique(one)) == len(one)


def test_the_seed_of_a_run_decides_neither_noise_nor_sample():
    """It is the coordinator's: who knows it could take the noise away."""
    results = [train(task(loss=nothing), data(50), ONE_STEP, private(1), seed=seed)[0] for seed in (1, 2)]
    np.testing.assert_array_equal(*results)


# Clipping.


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_one_example_more_changes_the_sum_by_no_more_than_the_clip(scale):
    """Without a clip, or with one of the mean instead of each example, the large one would be seen."""
    full = Work(steps=1, batch_size="full", learning_rate=1.0)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * scale).sum()

    sums = []
    for count in (30, 31):
        how = private(noise_multiplier=1e-9)
        sums.append(
            train(task(loss=loss), data(31) if count == 31 else first(data(31), 30), full, how)[0] * count
        )
    assert np.linalg.norm(sums[0] - sums[1]) <= CLIP * (1 + 1e-4)


def first(of: TensorDataset, count: int) -> TensorDataset:
    return TensorDataset(*(tensor[:count] for tensor in of.tensors))


def test_without_clipping_or_noise_private_training_is_plain_training():
    full = Work(steps=3, batch_size="full", learning_rate=0.1)
    plain, _ = train(task(), data(40), full, None)
    quiet, _ = train(task(), data(40), full, private(clip=1e4, noise_multiplier=1e-12))
    np.testing.assert_allclose(quiet, plain, rtol=1e-4, atol=1e-7)


def test_a_large_sample_is_summed_in_passes_and_comes_out_the_same():
    full = Work(steps=1, batch_size="full", learning_rate=1.0)
    found, _ = train(task(), data(300), full, private(noise_multiplier=1e-12))
    tensors = data(300).tensors
    parts = [TensorDataset(*(tensor[at : at + 50] for tensor in tensors)) for at in range(0, 300, 50)]
    small = sum(train(task(), part, full, private(noise_multiplier=1e-12))[0] for part in parts)
    np.testing.assert_allclose(found * 300, small * 50, rtol=1e-4, atol=1e-5)


# What is told.


@pytest.mark.parametrize(
    ("count", "work", "gradient", "mechanism"),
    [
        (100, Work(epochs=2, batch_size=10), False, SampledGaussian(SIGMA, 0.1, 20)),
        (95, Work(epochs=1, batch_size=10), False, SampledGaussian(SIGMA, 10 / 95, 10)),
        (100, Work(steps=7, batch_size=10), False, SampledGaussian(SIGMA, 0.1, 7)),
        (100, Work(epochs=2, batch_size=10), True, SampledGaussian(SIGMA, 0.1, 1)),
        (7, Work(epochs=2, batch_size=10), False, Gaussian(SIGMA, 2)),
        (1, Work(epochs=1, batch_size=10), False, Gaussian(SIGMA, 1)),
        (100, Work(batch_size="full"), True, Gaussian(SIGMA, 1)),
    ],
)
def test_what_was_done_is_told_and_neither_examples_nor_metrics_are(count, work, gradient, mechanism):
    delta, done = train(task(), data(count), work, private(), gradient=gradient)
    assert (done.num_examples, dict(done.metrics), done.mechanism) == (1, {}, mechanism)
    assert np.isfinite(delta).all()
    kind = "gradient" if gradient else "train"
    assert Schedule.of(work, count, kind).mechanism(SIGMA) == mechanism


def test_examples_with_nan_leave_an_update_that_is_finite():
    spoiled = data(30)
    spoiled.tensors[0][::3] = math.nan
    delta, _ = train(task(), spoiled, Work(epochs=1, batch_size=10), private())
    assert np.isfinite(delta).all()


class Odd(nn.Module):
    """A 0-d parameter, an integer buffer that nobody moves, a constant buffer, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(20, 10), nn.Parameter(torch.tensor(1.0))
        self.fixed = nn.Parameter(torch.ones(10), requires_grad=False)
        self.register_buffer("constant", torch.ones(10))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.fixed * self.constant


def test_only_what_has_noise_changes():
    of = task(Odd)
    layout = framework.initial_model(of, seed=1).layout
    delta, _ = train(of, data(30), Work(epochs=1, batch_size=10), private())
    assert np.count_nonzero(delta[: layout.trainable_size]) == layout.trainable_size  # the 0-d one, too
    assert not delta[layout.trainable_size :].any()


class Counting(nn.Module):
    """Keeps a mean of its data in a buffer, as batch normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 10)
        self.register_buffer("mean", torch.zeros(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean += x.detach().mean(0)
        return self.layer(x)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_buffer_that_training_updates_never_leaves(gradient):
    with pytest.raises(RefusedError, match="buffer") as error:
        train(task(Counting), data(30), ONE_STEP, private(), gradient=gradient)
    assert error.value.refusal.code == RefusalCode.MODEL_NOT_PRIVATE


def test_regularisation_is_added_behind_the_noise():
    work = Work(steps=1, batch_size=10, learning_rate=1.0, l2=0.25)
    with_l2, _ = train(task(loss=nothing), data(50), work, private(1))
    without, _ = train(task(loss=nothing), data(50), ONE_STEP, private(1))
    model = framework.initial_model(task(), seed=1).vector
    np.testing.assert_allclose(with_l2 - without, -0.25 * model, rtol=1e-3, atol=1e-6)


def test_a_proximal_term_is_added_behind_the_noise():
    one, two = ONE_STEP, ONE_STEP.model_copy(update={"steps": 2})
    first, free, held = (
        train(task(loss=nothing), data(50), work, private(1))[0]
        for work in (one, two, two.model_copy(update={"proximal": 0.25}))
    )
    np.testing.assert_allclose(held - free, -0.25 * first, rtol=1e-3, atol=1e-6)


# Evaluation.


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def evaluate(of: Task, how: Private | None) -> Outcome:
    model = framework.initial_model(of, seed=1).vector
    return Trainer(of, seed=1).evaluate(model, data(50), private=how)


def test_evaluating_without_noise_for_it_is_refused():
    with pytest.raises(ValueError, match="noise for an evaluation"):
        evaluate(task(accuracy=accuracy), private())


def test_noised_metrics_are_the_means_of_each_examples_own_value():
    quiet = private(evaluation_noise_multiplier=1e-9, loss_bound=100.0)
    of = task(accuracy=accuracy)
    found, plain = evaluate(of, quiet), evaluate(of, None)
    assert (found.num_examples, found.mechanism) == (1, Gaussian(1e-9))
    assert found.metrics == pytest.approx(plain.metrics, rel=1e-4)


def test_metrics_are_bounded_for_every_example_and_noised():
    wild = task(huge=lambda o, t: 1e9, low=lambda o, t: -5.0, nan=lambda o, t: math.nan, accuracy=accuracy)
    quiet = evaluate(wild, private(evaluation_noise_multiplier=1e-9, loss_bound=0.5)).metrics
    assert quiet["huge"] == pytest.approx(1)
    assert (quiet["low"], quiet["nan"]) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert quiet["loss"] <= 0.5 + 1e-6
    noised = [evaluate(wild, private(k, evaluation_noise_multiplier=3.0)).metrics["low"] for k in range(60)]
    assert np.std(noised) == pytest.approx(3.0 * math.sqrt(5) / 50, rel=0.4)
