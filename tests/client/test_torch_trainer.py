"""Training from a flat vector is ordinary torch training, and depends on nothing but its arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_cases import OPTIMIZERS, SEED, accuracy, gradient, mlp, noisy, rows, start_of, task_of, train

from fedge.errors import TaskError
from fedge.run import Work
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_client.torch.batches import Batches
from fedge_client.torch.framework import build_module
from fedge_client.torch.trainer import Trainer


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("l2", "proximal"), [(0.0, 0.0), (0.03, 0.0), (0.03, 0.5)])
def test_training_equals_plain_torch_training_of_an_ordinary_module(
    kind: str, l2: float, proximal: float
) -> None:
    # No bias before the normalisation: its gradient is rounding noise, which Adam would blow up.
    task = task_of(
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    )
    data = rows()
    work = Work(epochs=3, batch_size=8, optimizer=kind, learning_rate=0.1, l2=l2, proximal=proximal)
    plain = build_module(task, seed=SEED)
    begun = [parameter.detach().clone() for parameter in plain.parameters()]
    optimizer = OPTIMIZERS[kind](plain.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = l2
    batches = Batches(data, 8)
    losses = []
    for step in range(9):
        inputs, targets = batches.gather(batches.step(step, seed=5))
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(inputs), targets)
        moved = zip(plain.parameters(), begun, strict=True)
        (loss + proximal / 2 * sum(((now - then) ** 2).sum() for now, then in moved)).backward()
        optimizer.step()
        losses.append((loss.item(), len(inputs)))

    trainer, model = Trainer(task, seed=0), start_of(task)
    delta, outcome = train(trainer, model, work, data=data)
    expected = trainer.layout.flatten({k: v.numpy() for k, v in plain.state_dict().items()})
    np.testing.assert_allclose(model + delta, expected, rtol=1e-4, atol=1e-5)
    assert outcome.num_examples == 21
    assert outcome.metrics == {"train_loss": pytest.approx(sum(v * n for v, n in losses[6:]) / 21, rel=1e-5)}


def test_training_by_steps_counts_across_epochs_and_averages_over_all_of_them() -> None:
    task = task_of(mlp)
    trainer, model = Trainer(task, seed=0), start_of(task)
    by_epochs, _ = train(trainer, model, Work(epochs=2, batch_size=8))
    by_steps, outcome = train(trainer, model, Work(steps=6, batch_size=8))
    assert np.array_equal(by_epochs, by_steps)
    assert outcome.num_examples == 21
    still = Work(steps=4, batch_size=8, learning_rate=1e-12)
    losses = [gradient(trainer, model, still, step=step)[1].metrics["train_loss"] for step in range(4)]
    expected = sum(loss * size for loss, size in zip(losses, [8, 8, 5, 8], strict=True)) / 29
    assert train(trainer, model, still)[1].metrics["train_loss"] == pytest.approx(expected, rel=1e-6)


def test_without_epochs_or_steps_one_epoch_is_trained() -> None:
    task = task_of(mlp)
    trainer, model = Trainer(task, seed=0), start_of(task)
    one, default = (train(trainer, model, Work(epochs=epochs))[0] for epochs in (1, None))
    assert np.array_equal(one, default)


@pytest.mark.parametrize("batch_size", [8, "full"])
def test_one_local_step_of_sgd_moves_against_the_gradient_of_step_zero(batch_size: Any) -> None:
    task = task_of(mlp)
    trainer, model = Trainer(task, seed=0), start_of(task)
    work = Work(steps=1, batch_size=batch_size, learning_rate=0.5, l1=0.01, l2=0.1)
    delta, _ = train(trainer, model, work)
    slope, outcome = gradient(trainer, model, work)
    np.testing.assert_allclose(delta, -0.5 * slope, atol=1e-6)
    assert outcome.num_examples == (21 if batch_size == "full" else 8)


def test_a_proximal_term_is_nothing_where_training_begins_and_holds_it_back_later() -> None:
    task = task_of(mlp)
    trainer, model = Trainer(task, seed=0), start_of(task)

    def moved(steps: int, proximal: float) -> Array:
        work = Work(steps=steps, batch_size=8, learning_rate=0.1, proximal=proximal)
        return train(trainer, model, work)[0]

    assert np.array_equal(moved(1, 5.0), moved(1, 0.0))
    lengths = [float(np.linalg.norm(moved(40, proximal))) for proximal in (0.0, 0.1, 1.0, 5.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0] / 4
    slopes = [gradient(trainer, model, Work(batch_size=8, proximal=proximal))[0] for proximal in (0.0, 5.0)]
    assert np.array_equal(*slopes)


def test_the_steps_of_an_epoch_have_gradients_whose_weighted_mean_is_the_full_one() -> None:
    task = task_of(mlp)
    trainer, model = Trainer(task, seed=0), start_of(task)
    parts = [gradient(trainer, model, Work(batch_size=8), step=step) for step in (3, 4, 5)]
    assert [outcome.num_examples for _, outcome in parts] == [8, 8, 5]
    mean = sum(part * outcome.num_examples for part, outcome in parts) / 21
    full, _ = gradient(trainer, model, Work(batch_size="full"))
    np.testing.assert_allclose(mean, full, atol=1e-6)


def test_a_gradient_has_zeros_for_frozen_parameters_and_the_change_of_each_float_buffer() -> None:
    class Decaying(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            output = super().forward(inputs)
            self.weight.data.mul_(0.5)  # frozen, but a forward can do what it likes
            self.seen = self.seen + 1
            return output

    def model() -> nn.Module:
        module = nn.Sequential(Decaying(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        module[0].weight.requires_grad_(False)
        module[0].register_buffer("seen", torch.zeros(()))
        return module

    task = task_of(model)
    trainer, start = Trainer(task, seed=0), start_of(task)
    found, _ = gradient(trainer, start, Work(batch_size=8, l1=0.5, l2=0.5))
    parts = trainer.layout.views(found)
    hidden = build_module(task, seed=SEED)[0](rows()[Batches(rows(), 8).step(0, seed=5)][0])
    assert not parts["0.weight"].any()
    assert parts["0.seen"] == 1
    np.testing.assert_allclose(parts["1.running_mean"], 0.1 * hidden.mean(0).detach(), atol=1e-6)
    np.testing.assert_allclose(parts["1.running_var"], 0.1 * (hidden.var(0).detach() - 1), atol=1e-6)
    assert parts["2.weight"].any()


def test_a_gradient_includes_its_regularisation() -> None:
    task = task_of(mlp)
    trainer, model = Trainer(task, seed=0), start_of(task)
    plain, with_both = (gradient(trainer, model, work)[0] for work in (Work(), Work(l1=0.1, l2=0.3)))
    np.testing.assert_allclose(with_both - plain, 0.1 * np.sign(model) + 0.3 * model, atol=1e-6)


def test_regularisation_leaves_the_frozen_and_the_buffers_alone() -> None:
    def model() -> nn.Module:
        module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        module[0].requires_grad_(False)
        return module

    task = task_of(model)
    trainer = Trainer(task, seed=0)
    delta, _ = train(trainer, start_of(task), Work(l1=0.5, l2=0.5))
    assert not delta[trainer.layout.trainable_size :].any()
    assert delta[: trainer.layout.trainable_size].all()


# -- everything that affects the result is an argument ------------------------------------------------

Action = Callable[[Trainer, Array], object]


def cancelled(done: int, total: int) -> None:
    if done == 2:
        raise KeyboardInterrupt


def cancel(trainer: Trainer, model: Array) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer.train(
            model, rows(), Work(epochs=2, batch_size=8), seed=1, out=model.copy(), progress=cancelled
        )


def fail_in_the_data(trainer: Trainer, model: Array) -> None:
    broken = [*[(torch.zeros(6), 0)] * 5, (torch.zeros(5), 0)]
    with pytest.raises(TaskError):
        trainer.train(model, broken, Work(epochs=2, batch_size=3), seed=1, out=model.copy())


def draw_globally(trainer: Trainer, model: Array) -> None:
    torch.rand(3), np.random.rand(3), random.random()


def spoil_the_module(trainer: Trainer, model: Array) -> None:
    module = trainer._flat.module
    module.eval()
    for parameter in module.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
        parameter.grad = None
    for buffer in module.buffers():
        buffer.fill_(77)


ACTIONS: list[Action] = [
    lambda trainer, model: train(trainer, model, Work(batch_size=6, optimizer="momentum"), seed=99),
    lambda trainer, model: train(
        trainer, model + 1, Work(steps=2, optimizer="adam", l1=0.1), data=rows(30, 4)
    ),
    lambda trainer, model: gradient(trainer, model, Work(batch_size=6), step=17),
    lambda trainer, model: trainer.evaluate(model * 2, rows(9)),
    cancel,
    fail_in_the_data,
    draw_globally,
    spoil_the_module,
]

LAWS: dict[str, Callable[[Trainer, Array], Any]] = {
    **{
        kind: lambda trainer, model, kind=kind: train(
            trainer, model, Work(epochs=2, batch_size=8, optimizer=kind, l1=0.01)
        )
        for kind in OPTIMIZERS
    },
    "gradient": lambda trainer, model: gradient(trainer, model, Work(batch_size=8), step=4),
    "evaluation": lambda trainer, model: (model, trainer.evaluate(model, rows(30))),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@settings(deadline=None, max_examples=20)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=4), seed=st.integers(0, 2**63 - 1))
def test_the_same_arguments_give_the_same_bits_whatever_ran_before(
    law: Callable[[Trainer, Array], Any], actions: list[Action], seed: int
) -> None:
    task = task_of(noisy, metrics={"accuracy": accuracy})
    model = start_of(task)
    expected, outcome = law(Trainer(task, seed=0), model)
    used = Trainer(task, seed=seed)
    for action in actions:
        action(used, model)
    found, again = law(used, model)
    assert np.array_equal(found, expected)
    assert again == outcome


@pytest.mark.parametrize("what", [train, gradient])
def test_another_seed_gives_another_result(what: Callable[..., tuple[Array, Outcome]]) -> None:
    task = task_of(noisy)
    trainer, model = Trainer(task, seed=0), start_of(task)
    one, other = (what(trainer, model, Work(batch_size="full"), seed=seed)[0] for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_dropout_differs_from_step_to_step_of_a_gradient_strategy() -> None:
    task = task_of(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)))
    trainer, model = Trainer(task, seed=0), start_of(task)
    alike = [rows(1)[0]] * 8  # so that only the dropped inputs can make a difference
    one, other = (gradient(trainer, model, Work(), data=alike, step=step)[0] for step in (0, 1))
    assert not np.allclose(one, other)


class Jittered(nn.Linear):
    """Draws from every global generator that user code may use."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * random.random() * float(np.random.normal()) * torch.rand(1)


def test_global_randomness_of_any_kind_is_seeded_and_given_back() -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    def reseed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    reseed()
    expected = drawn()
    task = task_of(lambda: Jittered(6, 3))
    results = []
    for _ in range(2):
        reseed()
        trainer = Trainer(task, seed=0)
        model = start_of(task)
        results.append((train(trainer, model, Work())[0].tolist(), trainer.evaluate(model, rows()).metrics))
        gradient(trainer, model, Work())
        cancel(trainer, model)
        assert drawn() == expected
        drawn()
        results.append((train(trainer, model, Work())[0].tolist(), trainer.evaluate(model, rows()).metrics))
    assert all(result == results[0] for result in results)


def test_training_and_evaluation_work_under_the_callers_no_grad() -> None:
    task = task_of(mlp)
    trainer, model = Trainer(task, seed=0), start_of(task)
    expected, _ = train(trainer, model, Work())
    with torch.no_grad():
        assert np.array_equal(train(trainer, model, Work())[0], expected)
