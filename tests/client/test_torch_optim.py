"""The in-place optimisers are the pure ones of the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import optimizer as reference
from fedge.optimizer import Optimizer
from fedge.run import Work
from fedge_client.torch.optim import InPlaceOptimizer

OPTIMIZERS = st.builds(
    Optimizer,
    kind=st.sampled_from(["sgd", "momentum", "adam"]),
    learning_rate=st.floats(1e-4, 1.0),
    momentum=st.floats(0, 0.99),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    epsilon=st.floats(1e-8, 1e-2),
)


@settings(deadline=None)
@given(OPTIMIZERS, st.integers(0, 20), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_in_place_steps_agree_with_the_pure_reference(
    optimizer: Optimizer, size: int, steps: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    expected = random.standard_normal(size).astype(np.float32)
    slots = reference.init_slots(optimizer, size)
    theta = torch.from_numpy(expected.copy())
    in_place = InPlaceOptimizer(size)
    in_place.begin(optimizer)
    for _ in range(steps):
        gradient = random.standard_normal(size).astype(np.float32)
        expected, slots = reference.apply(optimizer, expected, slots, gradient)
        given_gradient = torch.from_numpy(gradient.copy())
        in_place.step(theta, given_gradient)
        assert np.array_equal(given_gradient.numpy(), gradient)
    np.testing.assert_allclose(theta.numpy(), expected, rtol=2e-4, atol=2e-5)


@settings(deadline=None)
@given(OPTIMIZERS, OPTIMIZERS)
def test_beginning_anew_forgets_whatever_was_optimised_before(first: Optimizer, second: Optimizer) -> None:
    def run(in_place: InPlaceOptimizer, optimizer: Optimizer) -> list[float]:
        theta = torch.linspace(-1, 1, 5)
        in_place.begin(optimizer)
        for at in range(3):
            in_place.step(theta, torch.linspace(at, 1, 5))
        return theta.tolist()

    used = InPlaceOptimizer(5)
    run(used, first)
    assert run(used, second) == run(InPlaceOptimizer(5), second)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_regularisation_adds_the_gradient_of_its_penalty(l1: float, l2: float, proximal: float) -> None:
    theta = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], requires_grad=True)
    anchor = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.0])
    near = proximal / 2 * ((theta - anchor) ** 2).sum()
    (l1 * theta.abs().sum() + l2 / 2 * (theta**2).sum() + near).backward()
    gradient = torch.ones(5)
    work = Work(l1=l1, l2=l2, proximal=proximal)
    InPlaceOptimizer(5).regularise(gradient, theta.detach(), anchor, work)
    assert theta.grad is not None
    torch.testing.assert_close(gradient, theta.grad + 1)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_steps_after_the_first_allocate_no_vector(kind: str) -> None:
    in_place = InPlaceOptimizer(1000)
    in_place.begin(Optimizer(kind=kind))  # type: ignore[arg-type]  # a parametrised Kind
    theta, gradient = torch.zeros(1000), torch.ones(1000)
    in_place.step(theta, gradient)
    with torch.profiler.profile(profile_memory=True) as profile:
        in_place.step(theta, gradient)
    assert max((event.cpu_memory_usage for event in profile.key_averages()), default=0) < 1000
