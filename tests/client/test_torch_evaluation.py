"""Evaluation, inputs of every shape, and what happens when user code fails: the trainer's other half."""

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

from fedge import Task
from fedge.errors import FedgeError, LayoutError, TaskError
from fedge.run import Work
from fedge_client.torch.batches import Batches
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module, framework
from fedge_client.torch.trainer import Trainer

# -- evaluation ---------------------------------------------------------------------------------------


def test_evaluation_calls_each_metric_once_with_the_whole_test_set_in_eval_mode() -> None:
    calls = []

    def seen(output: torch.Tensor, target: torch.Tensor) -> int:
        calls.append((output.shape, target.tolist()))
        return 3

    task = task_of(noisy, metrics={"accuracy": accuracy, "seen": seen, "nan": lambda o, t: float("nan")})
    trainer, model, data = Trainer(task, seed=0), start_of(task), rows(2500)
    plain = build_module(task, seed=SEED).eval()
    inputs, targets = data.tensors
    steps: list[tuple[int, int]] = []
    outcome = trainer.evaluate(model, data, progress=lambda done, total: steps.append((done, total)))
    assert outcome.num_examples == 2500
    assert calls == [(torch.Size([2500, 3]), targets.tolist())]
    assert outcome.metrics["seen"] == 3.0
    assert np.isnan(outcome.metrics["nan"])
    assert outcome.metrics["loss"] == pytest.approx(F.cross_entropy(plain(inputs), targets).item(), rel=1e-5)
    assert outcome.metrics["accuracy"] == pytest.approx(accuracy(plain(inputs), targets).item())
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_tensor_that_a_module_keeps_from_evaluation_serves_training() -> None:
    class Cached(nn.Linear):
        table: torch.Tensor | None = None

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.table is None:
                self.table = torch.linspace(0, 1, 3)
            return super().forward(inputs) * self.table

    task = task_of(lambda: Cached(6, 3))
    trainer, model = Trainer(task, seed=0), start_of(task)
    trainer.evaluate(model, rows())
    assert train(trainer, model, Work())[0].any()


def test_a_test_set_in_several_batches_is_judged_like_one_in_any_structure() -> None:
    class Structured(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> Any:
            return {"logits": super().forward(inputs), "aside": (inputs, None)}

    task = task_of(
        lambda: Structured(6, 3),
        loss=lambda output, target: F.cross_entropy(output["logits"], target),
        metrics={"rows": lambda output, target: len(output["aside"][0]) + len(target)},
    )
    outcome = Trainer(task, seed=0).evaluate(start_of(task), rows(1500))
    assert outcome.metrics["rows"] == 3000


# -- what a batch's input may be, what a model may do -------------------------------------------------


class Sum(nn.Linear):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x + y)


@pytest.mark.parametrize(
    "shape", [lambda x: (x, 2 * x), lambda x: [x, 2 * x], lambda x: {"y": x, "x": 2 * x}]
)
def test_inputs_in_tuples_and_dicts_become_arguments_of_the_model(shape: Callable[[Any], Any]) -> None:
    single, several = task_of(lambda: nn.Linear(6, 3)), task_of(lambda: Sum(6, 3))
    model = start_of(single)
    expected, _ = train(Trainer(single, seed=0), model, Work(), data=[(3 * x, y) for x, y in rows()])
    found, _ = train(Trainer(several, seed=0), model, Work(), data=[(shape(x), y) for x, y in rows()])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_model_of_mixed_dtypes_trains_from_its_float32_master(kind: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4).bfloat16(), nn.Linear(4, 3).double()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(inputs.bfloat16()).double()).float()

    task = task_of(Mixed)
    trainer, model = Trainer(task, seed=0), start_of(task)
    before = trainer.evaluate(model, rows()).metrics["loss"]
    work = Work(epochs=30, learning_rate=0.05, optimizer=kind)
    delta, _ = train(trainer, model, work)
    assert trainer.evaluate(model + delta, rows()).metrics["loss"] < before - 0.02
    tiny, _ = train(trainer, model, Work(steps=1, learning_rate=1e-6))
    assert np.abs(tiny).max() > 0  # a step far below bfloat16's resolution is not lost in the master


def test_a_max_norm_written_as_an_assignment_to_data_is_kept() -> None:
    class MaxNorm(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
            return super().forward(inputs)

    task, data = task_of(lambda: MaxNorm(6, 3)), rows()
    plain = build_module(task, seed=SEED)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    batches = Batches(data, 8)
    for step in range(6):
        inputs, targets = batches.gather(batches.step(step, seed=5))
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
    trainer, model = Trainer(task, seed=0), start_of(task)
    delta, _ = train(trainer, model, Work(epochs=2, batch_size=8, learning_rate=0.1), data=data)
    expected = trainer.layout.flatten({k: v.numpy() for k, v in plain.state_dict().items()})
    np.testing.assert_allclose(model + delta, expected, atol=1e-6)


# -- progress, vectors and errors ---------------------------------------------------------------------


def test_progress_is_told_every_step() -> None:
    task = task_of(mlp)
    trainer, model, told = Trainer(task, seed=0), start_of(task), []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    trainer.train(model, rows(), Work(epochs=2, batch_size=8), seed=1, out=model.copy(), progress=progress)
    trainer.gradient(model, rows(), Work(), seed=1, step=3, out=model.copy(), progress=progress)
    assert told == [*((done, 6) for done in range(1, 7)), (1, 1)]


def test_a_vector_that_does_not_fit_is_refused_and_the_model_is_never_written_to() -> None:
    task = task_of(noisy)
    trainer, model = Trainer(task, seed=0), start_of(task)
    model.flags.writeable = False
    train(trainer, model, Work())
    gradient(trainer, model, Work())
    for wrong in (np.zeros(3, np.float32), model.astype(np.float64)):
        with pytest.raises(LayoutError, match="float32 vector"):
            trainer.train(wrong, rows(), Work(), seed=0, out=np.empty_like(model))
        with pytest.raises(LayoutError, match="float32 vector"):
            trainer.train(model, rows(), Work(), seed=0, out=wrong)
        with pytest.raises(LayoutError, match="float32 vector"):
            trainer.gradient(model, rows(), Work(), seed=0, step=0, out=wrong)


class Refusing(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("no way")


class Untrainable(nn.Linear):
    def train(self, mode: bool = True) -> Any:
        raise ZeroDivisionError("no way")


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise ZeroDivisionError("no way")


def linear() -> nn.Module:
    return nn.Linear(6, 3)


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("no way")


BROKEN: dict[str, tuple[Task, str]] = {
    "forward": (task_of(lambda: Refusing(6, 3)), "model's forward failed: ZeroDivisionError: no way"),
    "train()": (task_of(lambda: Untrainable(6, 3)), r"train\(\) failed: ZeroDivisionError: no way"),
    "loss": (task_of(linear, broken), "task's loss failed: ZeroDivisionError: no way"),
    "backward": (
        task_of(linear, lambda o, t: NoBackward.apply(F.cross_entropy(o, t))),
        "backward pass failed: ZeroDivisionError: no way",
    ),
    "not a scalar": (task_of(linear, lambda o, t: o.sum(1)), r"scalar.*Tensor of float32\[21\]"),
    "a number": (task_of(linear, lambda o, t: o.sum().item()), "scalar.*float"),
    "detached": (
        task_of(linear, lambda o, t: F.cross_entropy(o.detach(), t)),
        "depends on the model's parameters",
    ),
    "wrong width": (task_of(lambda: nn.Linear(7, 3)), "model's forward failed: RuntimeError"),
}


@pytest.mark.parametrize(("task", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_failure_of_user_code_is_the_tasks_error_and_says_where(task: Task, message: str) -> None:
    trainer, model = Trainer(task, seed=0), start_of(task)
    for what in (train, gradient):
        with pytest.raises(TaskError, match=message) as caught:
            what(trainer, model, Work(batch_size="full"))
        assert isinstance(caught.value.__cause__, ZeroDivisionError | RuntimeError | None)


@pytest.mark.parametrize("metric", [broken, lambda output, target: output, lambda output, target: "high"])
def test_a_metric_that_fails_or_is_no_number_is_the_tasks_error(metric: Callable[[Any, Any], Any]) -> None:
    task = task_of(linear, metrics={"fine": accuracy, "odd": metric})
    with pytest.raises(TaskError, match="metric 'odd' failed"):
        Trainer(task, seed=0).evaluate(start_of(task), rows())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (task_of(broken), "model failed: ZeroDivisionError: no way"),
        (task_of(lambda: 3), "torch.nn.Module, found a int"),
        (task_of(linear, metrics={"loss": accuracy}), "'loss'"),
    ],
)
def test_a_task_that_cannot_be_built_is_refused_at_once(task: Task, message: str) -> None:
    with pytest.raises(FedgeError, match=message):
        Trainer(task, seed=0)


# -- the framework -----------------------------------------------------------------------------------


@given(st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=20)
def test_the_initial_model_is_a_function_of_the_seed_and_disturbs_no_generator(seed: int) -> None:
    task = task_of(lambda: nn.Linear(6, 3 + 0 * random.randrange(9)))
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    first, second = (framework.initial_model(task, seed=seed) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before
    assert np.array_equal(first.vector, second.vector)
    assert first.layout == second.layout == Trainer(task, seed=1).layout
    assert not np.array_equal(first.vector, framework.initial_model(task, seed=seed ^ 1).vector)


def test_the_initial_model_is_that_of_the_module_built_from_the_same_seed() -> None:
    model = framework.initial_model(task_of(noisy), seed=SEED)
    assert np.array_equal(model.vector, FlatModule(build_module(task_of(noisy), seed=SEED)).vector)
