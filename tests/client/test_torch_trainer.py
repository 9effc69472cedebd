"""Training from a flat vector is ordinary torch training, and depends on nothing but its arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from fedge import Task
from fedge.errors import FedgeError, LayoutError, TaskError
from fedge.run import Work
from fedge.vector import Array
from fedge_client.torch.batches import Batches
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module, framework
from fedge_client.torch.trainer import Outcome, Trainer

SEED = 11


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and wait long for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def task_of(
    model: Callable[[], Any],
    loss: Callable[[Any, Any], Any] = F.cross_entropy,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
) -> Task:
    return Task(model=model, data=lambda site: (None, None), loss=loss, metrics=metrics or {})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def noisy() -> nn.Module:
    """Everything that could remember: dropout, batch statistics, an integer counter."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def rows(size: int = 21, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (
        torch.randn(size, 6, generator=generator),
        torch.randint(3, (size,), generator=generator),
    )
    return TensorDataset(inputs, targets)


def start_of(task: Task) -> Array:
    return framework.initial_model(task, seed=SEED).vector


def train(
    trainer: Trainer, model: Array, work: Work, *, data: Any = None, seed: int = 5
) -> tuple[Array, Outcome]:
    out = np.empty_like(model)
    outcome = trainer.train(model, rows() if data is None else data, work, seed=seed, out=out)
    return out, outcome


def gradient(
    trainer: Trainer, model: Array, work: Work, *, data: Any = None, seed: int = 5, step: int = 0
) -> tuple[Array, Outcome]:
    out = np.empty_like(model)
    outcome = trainer.gradient(model, rows() if data is None else data, work, seed=seed, step=step, out=out)
    return out, outcome


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.999), eps=1e-8),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("l2", [0.0, 0.03])
def test_training_equals_plain_torch_training_of_an_ordinary_module(kind: str, l2: float) -> None:
    # No bias before the normalisation: its gradient is rounding noise, which Adam would blow up.
    task = task_of(
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    )
    data, work = rows(), Work(epochs=3, batch_size=8, optimizer=kind, learning_rate=0.1, l2=l2)
    plain = build_module(task, seed=SEED)
    optimizer = OPTIMIZERS[kind](plain.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = l2
    batches = Batches(data, 8)
    losses = []
    for step in range(9):
        inputs, targets = batches.gather(batches.step(step, seed=5))
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(inputs), targets)
        loss.backward()
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
