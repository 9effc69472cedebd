"""Attacks on what is claimed: what they prove stays below the claim, comes near it, and exceeds it where noise,
clipping or the source of randomness is broken."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from audit import by_one_run, by_threshold
from torch.utils.data import TensorDataset

from fedge import Task
from fedge.pipeline import Clip, Update
from fedge.privacy.central import Central
from fedge.privacy.example import ExampleLevel
from fedge.privacy.mechanism import Gaussian
from fedge.privacy.pld import statement
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.secure import SecureSource
from fedge.run import Work
from fedge_client.torch.framework import framework
from fedge_client.torch.private import clipping
from fedge_client.torch.private.steps import Private
from fedge_client.torch.trainer import Trainer

DELTA = 1e-5


def source() -> SecureSource:
    """A fixed key: a test at 95 % confidence would else fail by chance once in a while."""
    return SecureSource(b"audit".ljust(32, b"."))


# A plain Gaussian, many times.


def draws(sigma: float, count: int = 3_000_000) -> tuple[np.ndarray, np.ndarray]:
    """Releases of 0 and of 1, the largest difference that a record makes."""
    noise = np.zeros(2 * count, np.float32)
    source().add_gaussian(noise, sigma)
    return noise[:count].astype(np.float64), noise[count:].astype(np.float64) + 1


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_an_attack_on_gaussian_noise_proves_more_than_seven_tenths_of_what_is_claimed(sigma: float):
    claimed = statement([Gaussian(sigma)], DELTA)[0]
    proven = by_threshold(*draws(sigma), DELTA)
    assert 0.7 * claimed < proven <= claimed <= epsilon_of([Gaussian(sigma)], DELTA)


def test_an_attack_finds_noise_of_half_the_deviation():
    assert by_threshold(*draws(0.5), DELTA) > 1.2 * statement([Gaussian(1.0)], DELTA)[0]


def test_an_attack_finds_noise_that_is_used_twice():
    """The difference of two releases with the same noise is what there was before the noise."""
    first, second = (np.zeros(5000, np.float32) for _ in range(2))
    source().add_gaussian(first, 3.0)
    source().add_gaussian(second, 3.0)  # another source of the same key
    included = np.random.default_rng(0).random(5000) < 0.5
    scores = (first + included) - second
    assert by_one_run(scores.astype(np.float64), included, DELTA) > statement([Gaussian(3.0, 2)], DELTA)[0]


# A site's training, once, with many canaries.

CANARIES, SIGMA, CLIP, RATE = 1000, 1.5, 0.5, 0.05


def canaries() -> torch.nn.Module:
    """A model of which each example has a parameter of its own."""
    return torch.nn.Linear(CANARIES, 1, bias=False)


def trained(sigma: float = SIGMA, *, steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """How far each canary's parameter has moved, and whether it was in the data."""
    included = np.random.default_rng(1).random(CANARIES) < 0.5
    rows = 30.0 * torch.eye(CANARIES)[torch.from_numpy(included)]  # far beyond the clip
    data = TensorDataset(rows, torch.ones(len(rows), 1))
    task = Task(
        model=canaries, data=lambda _: (data, data), loss=lambda output, target: (output * target).sum()
    )
    trainer, begun = Trainer(task, seed=0), framework.initial_model(task, seed=0).vector
    out = np.empty_like(begun)
    private = Private(ExampleLevel(CLIP, sigma), source())
    trainer.train(
        begun,
        data,
        Work(batch_size="full", steps=steps, learning_rate=RATE),
        seed=0,
        out=out,
        private=private,
    )
    return -out.astype(np.float64), included


CLAIM = statement([Gaussian(SIGMA)], DELTA)[0]


def test_an_attack_on_a_sites_training_proves_less_than_is_claimed_but_something():
    proven = by_one_run(*trained(), DELTA)
    assert 0.3 * CLAIM < proven <= CLAIM


def test_an_attack_on_several_steps_proves_less_than_their_composition():
    proven = by_one_run(*trained(steps=4), DELTA)
    assert CLAIM / 2 < proven <= statement([Gaussian(SIGMA, 4)], DELTA)[0]


def test_an_attack_finds_that_there_is_next_to_no_noise():
    assert by_one_run(*trained(0.05), DELTA) > CLAIM


def test_an_attack_finds_that_nothing_is_clipped():
    with patch.object(clipping.Factors, "of", unclipped):
        assert by_one_run(*trained(), DELTA) > CLAIM


def unclipped(squares: torch.Tensor, losses: torch.Tensor, clip: float) -> clipping.Factors:
    """Factors that leave every gradient as long as it is."""
    return clipping.Factors(torch.ones(len(squares)), None)


def test_an_attack_finds_noise_whose_key_somebody_knows():
    scores, included = trained()
    known = np.zeros(CANARIES, np.float32)
    stolen = source()
    for _ in range(3):  # the model's own random numbers come first
        stolen.uint32(8)
    stolen.poisson_sample(int(included.sum()), 1.0)
    stolen.add_gaussian(known, SIGMA * CLIP)
    assert by_one_run(scores - RATE * known / included.sum(), included, DELTA) > CLAIM


# A coordinator's round, once, with a client for each canary.


def round_of(central: Central, *, length: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    included = np.random.default_rng(2).random(CANARIES) < 0.5
    reduction = central.reduction(central.begin())
    state = reduction.start(CANARIES)
    for at in np.flatnonzero(included):
        vector = np.zeros(CANARIES, np.float32)
        vector[at] = length
        state = reduction.fold(state, Update(str(at), Clip(length).encode(vector), 1))
    _, aggregate = central.release(central.begin(), reduction.finish(state), source(), trainable=CANARIES)
    return aggregate.vector.astype(np.float64), included


@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("length", [1.0, 50.0], ids=["honest", "far beyond the clip"])
def test_an_attack_on_a_coordinators_noise_proves_less_than_is_claimed(bands: int, length: float):
    proven = by_one_run(*round_of(Central(SIGMA, 1.0, 500, bands), length=length), DELTA)
    assert (0.3 if bands == 1 else 0.1) * CLAIM < proven <= CLAIM


def test_an_attack_finds_a_coordinator_without_noise():
    assert by_one_run(*round_of(Central(0.01, 1.0, 500)), DELTA) > CLAIM
